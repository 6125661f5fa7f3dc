"""What a training needs, and what surrounds it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from transformers import PreTrainedModel

from sparse_train.config import LossConfig, TeacherConfig, TrainConfig
from sparse_train.tasks import Batch
from sparse_train.training.order import Order


@dataclass(frozen=True)
class TrainingRun:
    student: PreTrainedModel
    fetch: Callable[[list[int]], Batch]
    """Turns indices of examples into a batch; no index at all into a row of padding."""
    order: Order
    """The indices of each micro-step."""
    config: TrainConfig
    seed: int = 0
    """Of dropout."""
    packed: bool = False
    """Whether a row of a batch holds several examples (Batch.positions)."""
    loss: LossConfig = field(default_factory=LossConfig)
    teacher: PreTrainedModel | None = None
    """Needed where loss.needs_teacher says so."""
    teacher_config: TeacherConfig = field(default_factory=TeacherConfig)


class StepLog(Protocol):
    """Where the lines of metrics go; sparse_train.tracking.Tracker is one."""

    def rewind(self, step: int) -> None:
        """Drop what was logged after `step`: a resumed training logs it again."""

    def log(self, step: int, metrics: dict[str, Any]) -> None: ...


def _always_newest() -> None:
    pass


@dataclass(frozen=True)
class Hooks:
    """How a training is watched and ended. All but the last concern rank 0 alone and are None on the others."""

    tracker: StepLog | None = None
    progress: Callable[[int, int, str], None] | None = None
    """(steps done, of how many, note)."""
    deadline_s: float | None = None
    """When the process will be ended, in seconds since the epoch; None where nothing is known to end it."""
    require_newest_attempt: Callable[[], None] = _always_newest
    """Raises where a newer attempt at the same work has started. Called on rank 0 before checkpoints change."""
