"""A run: all of its sections, and the stages that have no room of their own: evaluate, compress, benchmark."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from sparse_train.config.base import Positive, Section
from sparse_train.config.loss import LossConfig
from sparse_train.config.model import ModelConfig
from sparse_train.config.pruning import PruneConfig
from sparse_train.config.task import TaskConfig
from sparse_train.config.training import DenseConfig, TeacherConfig, TrainConfig
from sparse_train.registry import FAMILIES


class FinetuneConfig(TrainConfig):
    losses: dict[str, LossConfig] = {"squarehead": LossConfig(feature_weight=1.0)}  # noqa: RUF012 - pydantic copies it
    """One fine-tune per entry, all with the same budget; the name is the folder's and the report's."""
    teacher: TeacherConfig = TeacherConfig()

    @field_validator("losses")
    @classmethod
    def _at_least_one(cls, losses):
        if not losses:
            raise ValueError("losses is empty; name at least one, such as squarehead: {feature_weight: 1}")
        for name in losses:
            if not re.fullmatch("[a-z0-9_][a-z0-9_-]{0,99}", name):
                raise ValueError(f"a loss is called {name!r}; take small letters, digits, _ and -, such as squarehead")
        taken = {"dense", "prune", "one-shot"} & set(losses)
        if taken:
            raise ValueError(f"a loss cannot be called {min(taken)}, which the report calls another model")
        return losses


class EvaluateConfig(Section):
    num_examples: Positive = 200
    """Test examples that are generated for and scored."""
    batch_size: Positive = 50
    max_new_tokens: Positive = 256
    num_beams: Positive = 1
    """1 is greedy."""


class CompressConfig(Section):
    loss: str | None = None
    """Which of finetune.losses is compressed, benchmarked and reported; None: the only one."""
    precisions: tuple[Literal["fp32", "bf16", "int8"], ...] = ("fp32", "int8")
    """One sparse folder per precision; int8 has one scale per row."""


class BenchmarkConfig(Section):
    devices: tuple[Literal["cpu", "gpu"], ...] = ("cpu",)
    """One benchmark stage each; on a cluster each can have a place of its own."""
    repeats: Positive = 20
    new_tokens: Positive = 64
    """Tokens decoded per measurement of tokens/s."""
    reference_layers: Literal["mpt-7b", "none"] = "mpt-7b"
    """The linears of one block of this model are timed beside the run's own."""

    @field_validator("devices")
    @classmethod
    def _devices_differ(cls, devices):
        if not devices or len(set(devices)) < len(devices):
            raise ValueError(f"devices={list(devices)}: name cpu, gpu or both, each once")
        return devices


class WandbConfig(Section):
    project: str = "sparse-train"
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"


class TrackingConfig(Section):
    wandb: WandbConfig | None = None
    """metrics.jsonl is always written; wandb when this is set, and training goes on if it fails."""


class RunConfig(Section):
    name: str = "run"
    about: str = ""
    """What the reader of the run's results should know; printed with them. It is true of this file's run: a file that
    extends this one does not have it, nor a run with overrides, but for name and folder."""
    folder: str = "runs"
    """The run's files go to folder/name."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 17
    task: TaskConfig = TaskConfig()
    model: ModelConfig = ModelConfig()
    dense: DenseConfig = DenseConfig()
    prune: PruneConfig
    finetune: FinetuneConfig = FinetuneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    compress: CompressConfig = CompressConfig()
    benchmark: BenchmarkConfig = BenchmarkConfig()
    tracking: TrackingConfig = TrackingConfig()
    sweep: dict[str, tuple[Any, ...]] = {}  # noqa: RUF012
    """Dotted keys and the values that each takes. A run does every combination, in folders below the run's, and trains
    the dense model once for those that agree on it."""

    @model_validator(mode="before")
    @classmethod
    def _task_of_the_family(cls, given):
        model, task = (given.get(key, {}) for key in ("model", "task")) if isinstance(given, dict) else (None, None)
        if isinstance(model, dict) and isinstance(task, dict) and "name" not in task:
            family = FAMILIES.entries.get(str(model.get("family")))
            if family is not None:
                return {**given, "task": {**task, "name": family.task}}
        return given

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name):
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", name):
            raise ValueError(f"name={name}: a run's name is letters, digits, . _ and -, at most 100, and begins with "
                             "neither . nor -, such as my-run")
        return name

    @model_validator(mode="after")
    def _one_loss_is_compressed(self):
        names, chosen = ", ".join(self.finetune.losses), self.compress.loss
        if chosen is None and len(self.finetune.losses) > 1:
            raise ValueError(f"compress.loss is missing: finetune.losses has {names}; give the one whose model is "
                             f"compressed, such as compress.loss={list(self.finetune.losses)[-1]}")
        if chosen is not None and chosen not in self.finetune.losses:
            raise ValueError(f"compress.loss={chosen} is none of finetune.losses: {names}; give the one whose model is "
                             f"compressed, such as compress.loss={list(self.finetune.losses)[-1]}")
        return self

    @property
    def compressed_loss(self) -> str:
        return self.compress.loss or next(iter(self.finetune.losses))

    @field_validator("sweep")
    @classmethod
    def _something_to_sweep(cls, sweep):
        for key, values in sweep.items():
            if not values:
                raise ValueError(f"{key} has no value; list at least one, such as [1, 2]")
            if key in ("name", "folder", "sweep"):
                raise ValueError(f"{key} is what tells combinations apart; sweep over another key")
        return sweep

    @property
    def path(self) -> Path:
        return Path(self.folder) / self.name
