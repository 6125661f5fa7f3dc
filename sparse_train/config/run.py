"""A run: all of its sections, with those of evaluate, compress, benchmark and tracking."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from sparse_train.config.base import Positive, Precision, Section
from sparse_train.config.loss import LossConfig
from sparse_train.config.model import ModelConfig
from sparse_train.config.pruning import PruneConfig
from sparse_train.config.task import RunTaskConfig, TaskConfig
from sparse_train.config.training import DenseConfig, TeacherConfig, TrainConfig
from sparse_train.registry import FAMILIES


def _check_names(names: Iterable[str], what: str, example: str) -> None:
    for name in names:
        if not re.fullmatch("[a-z0-9_][a-z0-9_-]{0,99}", name):
            raise ValueError(f"{what} is called {name!r}; take small letters, digits, _ and -, such as {example}")


class FinetuneConfig(TrainConfig):
    losses: dict[str, LossConfig] = {"squarehead": LossConfig(feature_weight=1.0)}  # noqa: RUF012 - pydantic copies it
    """One fine-tune per entry, all with the same budget; the name is the folder's and the report's."""
    teacher: TeacherConfig = TeacherConfig()

    @field_validator("losses")
    @classmethod
    def _at_least_one(cls, losses: dict[str, LossConfig]) -> dict[str, LossConfig]:
        if not losses:
            raise ValueError("losses is empty; name at least one, such as squarehead: {feature_weight: 1}")
        _check_names(losses, "a loss", "squarehead")
        reserved = {"dense", "prune", "one-shot"} & set(losses)
        if reserved:
            raise ValueError(f"a loss cannot be called {min(reserved)}, which the report calls another model")
        return losses


class EvaluateConfig(Section):
    num_examples: Positive = 200
    """Test examples that the model answers and that are scored."""
    precision: Precision = "fp32"
    """Of weights and products of the dense, one-shot and fine-tuned models; losses are summed in fp32 either way. bf16
    needs half of the memory, and less than half of the time on devices that have instructions for it."""
    placement: Literal["replicated", "sharded"] = "replicated"
    """replicated: each rank holds the models, and makes batches of its own. sharded: each rank holds a part of them
    (ZeRO-3), and all make every batch together, which is for models that are larger than a device."""
    batch_size: Positive = 50
    max_new_tokens: Positive = 256
    num_beams: Positive = 1
    """1 is greedy."""
    texts: dict[str, TaskConfig] = {}  # noqa: RUF012 - pydantic copies it
    """Sets of general text under names of your own, such as {books: {path: ...}}. The perplexity of every model on
    their test pieces, and KL(dense || model) per token in nats, are printed beside the task's score."""
    num_texts: Positive = 100
    """Pieces of each of evaluate.texts."""

    @field_validator("texts", mode="before")
    @classmethod
    def _plain_text(cls, texts: Any) -> Any:
        if not isinstance(texts, dict):
            return texts
        return {name: {"name": "text", **text} if isinstance(text, dict) else text for name, text in texts.items()}

    @field_validator("texts")
    @classmethod
    def _names_of_texts(cls, texts: dict[str, TaskConfig]) -> dict[str, TaskConfig]:
        _check_names(texts, "a set of texts", "books")
        return texts


class CompressConfig(Section):
    loss: str | None = None
    """Which of finetune.losses is compressed, benchmarked and reported; None: the only one."""
    precisions: tuple[Literal["fp32", "bf16", "int8", "int4"], ...] = ("fp32", "int8")
    """One sparse folder per precision; int8 has a scale per row, int4 one per row and 128 columns."""
    int8_head: bool = False
    """Whether int8 and int4 quantise the output head to int8 as well. In a model with a large vocabulary the head in
    fp32 takes more of a token's time than everything else. An embedding that is tied to it stays as it is."""
    rounding: Literal["nearest", "compensated"] = "nearest"
    """compensated: what rounding to int8 or int4 changes in one column of a sparse weight is made up for in the others,
    so that a layer's outputs change little. It calibrates as pruning does, with prune.num_calibration, .calibration,
    .batch_size and .damping. An output head that becomes int8 is rounded to nearest."""

    @model_validator(mode="after")
    def _something_is_rounded(self) -> Self:
        if self.rounding == "compensated" and not {"int8", "int4"} & set(self.precisions):
            raise ValueError(f"rounding=compensated is for int8 and int4, and precisions={list(self.precisions)} has "
                             "neither; add one, or leave rounding out")
        return self


class BenchmarkConfig(Section):
    devices: tuple[Literal["cpu", "gpu"], ...] = ("cpu",)
    """One benchmark stage each; a cluster file can give each its own nodes."""
    repeats: Positive = 20
    new_tokens: Positive = 64
    """Tokens decoded per measurement of tokens/s."""
    reference_layers: Literal["mpt-7b", "none"] = "mpt-7b"
    """A model; the linears of one of its blocks are timed beside those of the run."""

    @field_validator("devices")
    @classmethod
    def _devices_differ(cls, devices: tuple[str, ...]) -> tuple[str, ...]:
        if not devices or len(set(devices)) < len(devices):
            raise ValueError(f"devices={list(devices)}: name cpu, gpu or both, each once")
        return devices


class WandbConfig(Section):
    project: str = "sparse-train"
    entity: str | None = None
    mode: Literal["online", "offline"] = "online"


class TrackingConfig(Section):
    wandb: WandbConfig | None = None
    """Also send metrics to wandb, beside metrics.jsonl; training continues if wandb fails."""


class RunConfig(Section):
    name: str = "run"
    about: str = ""
    """A remark for readers of the results, printed with them. It describes the run of this file alone: a file that
    extends this one drops it, and so does an override of any key but name and folder."""
    folder: str = "runs"
    """The run's files go to folder/name."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 17
    task: RunTaskConfig = RunTaskConfig()
    model: ModelConfig = ModelConfig()
    dense: DenseConfig = DenseConfig()
    prune: PruneConfig
    finetune: FinetuneConfig = FinetuneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    compress: CompressConfig = CompressConfig()
    benchmark: BenchmarkConfig = BenchmarkConfig()
    tracking: TrackingConfig = TrackingConfig()
    sweep: dict[str, tuple[Any, ...]] = {}  # noqa: RUF012
    """Dotted keys, each with its values. Every combination runs, in a folder below the run's; those with the same dense
    settings share one dense model."""

    @model_validator(mode="before")
    @classmethod
    def _task_of_the_family(cls, tree: Any) -> Any:
        model, task = (tree.get(key, {}) for key in ("model", "task")) if isinstance(tree, dict) else (None, None)
        if isinstance(model, dict) and isinstance(task, dict) and "name" not in task:
            family = FAMILIES.entries.get(str(model.get("family")))
            if family is not None:
                return {**tree, "task": {**task, "name": family.task}}
        return tree

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", name):
            raise ValueError(f"name={name}: a run's name is letters, digits, . _ and -, at most 100, and begins with "
                             "neither . nor -, such as my-run")
        return name

    @model_validator(mode="after")
    def _one_loss_is_compressed(self) -> Self:
        losses, chosen = list(self.finetune.losses), self.compress.loss
        remedy = f"give the one whose model is compressed, such as compress.loss={losses[-1]}"
        if chosen is None and len(losses) > 1:
            raise ValueError(f"compress.loss is missing: finetune.losses has {', '.join(losses)}; {remedy}")
        if chosen is not None and chosen not in losses:
            raise ValueError(f"compress.loss={chosen} is none of finetune.losses: {', '.join(losses)}; {remedy}")
        return self

    @model_validator(mode="after")
    def _windows_are_not_shared(self) -> Self:
        for key, training in (("dense", self.dense), ("finetune", self.finetune)):
            ranks = training.sequence_parallel
            if self.task.pack and ranks > 1:
                raise ValueError(f"{key}.sequence_parallel={ranks}: ranks that share tokens cannot keep examples of a "
                                 f"window apart; use {key}.sequence_parallel=1, or leave task.pack out")
        return self

    @model_validator(mode="after")
    def _tasks_know_their_keys(self) -> Self:
        mix = self.task.mix
        for key, task in (("task.mix.task", mix and mix.task), ("prune.calibration", self.prune.calibration),
                          *((f"evaluate.texts.{name}", text) for name, text in self.evaluate.texts.items())):
            if task:
                task._key = key
        return self

    @property
    def compressed_loss(self) -> str:
        """The name in finetune.losses whose model is compressed."""
        return self.compress.loss or next(iter(self.finetune.losses))

    @field_validator("sweep")
    @classmethod
    def _something_to_sweep(cls, sweep: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        for key, values in sweep.items():
            if not values:
                raise ValueError(f"{key} has no value; list at least one, such as [1, 2]")
            if key in ("name", "folder", "sweep"):
                raise ValueError(f"{key} is what tells combinations apart; sweep over another key")
        return sweep

    @property
    def path(self) -> Path:
        """The run's folder."""
        return Path(self.folder) / self.name
