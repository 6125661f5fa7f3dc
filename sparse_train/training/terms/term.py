"""What a term of the loss reads and returns. Letters: B batch, T tokens, D width, R rows, V vocabulary."""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from sparse_train.config import LossConfig
from sparse_train.tasks.batch import IGNORED


@dataclass(frozen=True)
class ModelOutputs:
    """What the models computed on this rank in one micro-step, at the R positions that a term reads or at some of them.

    Such a position is a row. The others have no logits: the model's head does not work on them (`Head` in head.py).
    """

    logits: torch.Tensor
    """(R, V), the student's."""
    targets: torch.Tensor
    """(R,) int64: what each position predicts, -100 for nothing."""
    labels: torch.Tensor
    """(R,) int64: each position's own label, -100 for none. With an encoder they are the targets."""
    teacher_logits: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    """(R, V); no rows where no term has `uses_teacher_logits`, or without a teacher."""

    @functools.cached_property
    def is_target(self) -> torch.Tensor:
        """(R,) bool: positions that predict something."""
        return self.targets != IGNORED

    @functools.cached_property
    def num_targets(self) -> torch.Tensor:
        return self.is_target.sum()

    @functools.cached_property
    def predictions(self) -> torch.Tensor:
        """(N, V) fp32: the logits at the N positions that predict something."""
        return self.logits[self.is_target].float()

    @functools.cached_property
    def log_probs(self) -> torch.Tensor:
        """(R, V) fp32: the student's log-probabilities."""
        return functional.log_softmax(self.logits.float(), -1)

    @functools.cached_property
    def zero(self) -> torch.Tensor:
        """Scalar 0 with a gradient of zeros: it keeps a rank without targets in the graph."""
        return self.logits[:0].float().sum()

    def some(self, rows: slice, logits: torch.Tensor) -> "ModelOutputs":
        """Those of some rows, with `logits` for the student's."""
        return ModelOutputs(logits, self.targets[rows], self.labels[rows], self.teacher_logits[rows])


RowSum = Callable[[ModelOutputs], torch.Tensor]
"""A sum over the rows of some outputs, whose `logits` are fp32: scalar, with gradient with respect to them."""


@dataclass(frozen=True)
class Ratio:
    """A term as sums over this rank's tokens. Both sums are added over the ranks before one is divided by the other."""

    numerators: torch.Tensor | RowSum
    """With gradient: scalar, or (L,) for a term of L parts that are added up, or (L, P) for parts of P ratios each.
    Or a function that gives the scalar for some rows: it is called for a few rows at a time, so that nothing of
    the size of all logits is made in fp32, and all terms' gradients are summed in fp32 before they are rounded to the
    logits' dtype."""
    denominators: torch.Tensor
    """Of the same shape, without gradient."""
    minimum: float = 1.0
    """A smaller denominator counts as this one: there is nothing to divide, such as no target on any rank."""


class LossTerm(ABC):
    """One term in one micro-step; an instance is made for each."""

    uses_features: bool = False
    """Whether add_features is called."""
    uses_teacher_logits: bool = True
    """Whether the teacher's logits are read. Where no term reads them its head does no work."""

    def __init__(self, config: LossConfig):
        self.config = config

    def add_features(self, student: torch.Tensor, teacher: torch.Tensor, attend: torch.Tensor) -> None:
        """Called for each compared block while the teacher runs, which then lets go of its output.

        `student`, `teacher` (B, T, D); `attend` (B, T) bool, True at real tokens.
        """
        raise NotImplementedError

    @abstractmethod
    def ratio(self, outputs: ModelOutputs) -> Ratio:
        """The term's sums of this micro-step."""
