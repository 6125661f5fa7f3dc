"""A stage of a run as data: its kind, its inputs, and its loss, level or device."""

from dataclasses import dataclass
from enum import StrEnum

from sparse_train.config import LossConfig, RunConfig


class Kind(StrEnum):
    """What a stage does; the module of `jobs` for it has the same name."""

    DENSE = "dense"
    PRUNE = "prune"
    FINETUNE = "finetune"
    EVALUATE = "evaluate"
    COMPRESS = "compress"
    BENCHMARK = "benchmark"
    REPORT = "report"


_TRAINING = (Kind.DENSE, Kind.FINETUNE)
_DISTRIBUTED = (*_TRAINING, Kind.PRUNE, Kind.EVALUATE)


@dataclass(frozen=True)
class Stage:
    kind: Kind
    id: str
    """Its folder below the run's, such as finetune/squarehead, or finetune/75/squarehead in a chain."""
    reads: tuple[str, ...] = ()
    """Keys and sections of the config that its result depends on, dotted."""
    inputs: tuple["Stage", ...] = ()
    """The stages whose results it reads, dense first."""
    external: str | None = None
    """dense: a folder or a name on the hub to read in its place; the stage is then an input and never runs."""
    loss: str | None = None
    """finetune: which of config.finetune.losses; prune: that of the fine-tuned model to prune, None for dense."""
    level: int = 0
    """prune, finetune: which of config.prune.levels."""
    device: str | None = None
    """benchmark: which of config.benchmark.devices."""

    @property
    def is_distributed(self) -> bool:
        """Whether it runs on all ranks of the cluster config and saves its state; other stages are one process."""
        return self.kind in _DISTRIBUTED

    @property
    def is_training(self) -> bool:
        return self.kind in _TRAINING

    @property
    def upstream(self) -> tuple["Stage", ...]:
        """Its inputs that the same run makes: all but an external one."""
        return tuple(source for source in self.inputs if source.external is None)

    @property
    def model_name(self) -> str:
        """What tables call its model: dense, one-shot, or the loss."""
        return self.loss or ("one-shot" if self.kind is Kind.PRUNE else self.kind.value)

    def loss_config(self, config: RunConfig) -> LossConfig:
        """The loss of a fine-tune."""
        assert self.loss is not None
        return config.finetune.losses[self.loss]


def kind_of(name: str) -> Kind:
    """The kind of a stage named by its kind or its id. Raises ValueError where there is no such kind."""
    kind = name.partition("/")[0]
    if kind not in list(Kind):
        raise ValueError(f"there is no stage {name}; choose from: {', '.join(Kind)}")
    return Kind(kind)
