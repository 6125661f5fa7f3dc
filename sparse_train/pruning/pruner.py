"""The interface of a pruning method: what it collects from a linear's inputs, and how it prunes the weight with that.

A method is one class in a file of its own and one line in sparse_train/registry.py. wanda.py is a short example.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Generic, Protocol, TypeVar

import torch

from sparse_train import dist
from sparse_train.config import PruneConfig, PruneLevel, Section
from sparse_train.config.options import read_options
from sparse_train.errors import UserError
from sparse_train.pruning.refit import refit
from sparse_train.pruning.rows import panels
from sparse_train.pruning.statistics import ColumnNorms, Gradients, Hessian
from sparse_train.registry import PRUNERS


class Statistics(Protocol):
    """Collected from the calibration inputs of one linear; statistics.py has those that exist."""

    sum: torch.Tensor
    """fp64; the sum over the ranks is that of all batches."""
    num_tokens: int

    def add(self, inputs: torch.Tensor) -> None:
        """`inputs` (tokens, C) of a batch: real tokens only."""


class Collects(Protocol):
    """Wants statistics of the inputs of linears."""

    @property
    def Statistics(self) -> type | None:
        """As Pruner.Statistics."""

    @property
    def without_inputs(self) -> str:
        """The remedy where a layer's inputs cannot be used."""


S = TypeVar("S", bound=Statistics | Gradients | None)


@dataclass(frozen=True)
class Layer:
    """A linear to prune."""

    name: str
    weight: torch.Tensor
    """(R, C): rows are outputs, columns inputs."""
    spec: PruneLevel
    """Its sparsity is this layer's own."""
    earlier: torch.Tensor | None = None
    """keep (R, C) of a level before: what it dropped stays dropped."""
    num_rows: int | None = None
    """Of the linear whose rows are divided over the ranks, which prune it together; `weight` has this rank's. None: it
    has all of them."""

    @property
    def num_weights(self) -> int:
        """Of the whole linear."""
        return (self.weight.shape[0] if self.num_rows is None else self.num_rows) * self.weight.shape[1]

    def count(self, mask: torch.Tensor) -> int:
        """True entries of `mask` (R, C), over the whole linear. Collective where that is divided."""
        return int(mask.sum() if self.num_rows is None else dist.sum_over_ranks(mask.sum()))

    def require_finite(self, statistics: Statistics) -> None:
        """Raises UserError where the weight or `statistics` are not. Collective where the linear is divided."""
        for what, tensor in (("its weight", self.weight), ("what reaches it in calibration", statistics.sum)):
            if self.count(~torch.isfinite(tensor)):
                raise UserError(f"{self.name}: {what} is not finite; the dense model is damaged or overflows")


class Pruner(ABC, Generic[S]):
    Statistics: ClassVar[type | None] = None
    """Class of what is collected from the inputs of each linear, made from (C, device); None: nothing, and no
    calibration data is read (`calibrates=False` in the registry). Gradients: each rank keeps those of its examples, and
    `prune` is called on all ranks together."""
    Options: ClassVar[type[Section]] = Section
    """Schema of `prune.options`, the method's own settings."""
    divides_rows: bool = False
    """Whether `prune` may get some of a linear's rows on each rank. It then chooses bits with keep_best alone, and
    takes products with `multiply` (rows.py)."""

    def __init__(self, options: Section | None = None):
        """`options`: an instance of the class's Options; None: its defaults."""
        self.options = options or self.Options()

    @property
    def without_inputs(self) -> str:
        """The remedy where a layer's inputs cannot be used."""
        methods = [name for name, entry in PRUNERS.entries.items() if not entry.calibrates]
        return f"use prune.method={' or '.join(methods)}"

    @abstractmethod
    def prune(self, layer: Layer, statistics: S) -> tuple[torch.Tensor, torch.Tensor]:
        """(weight (R, C) with zeros where pruned, keep (R, C) bool). `layer.weight` is not changed."""


class Refitted(Pruner[Hessian]):
    """The bits of a method, with the values that fit them best: prune.refit. The Hessian has what the method reads."""

    Statistics = Hessian

    def __init__(self, method: Pruner):
        super().__init__()
        self._method, self.divides_rows = method, method.divides_rows

    @property
    def without_inputs(self) -> str:
        return f"{self._method.without_inputs} with prune.refit=false"

    def prune(self, layer: Layer, statistics: Hessian) -> tuple[torch.Tensor, torch.Tensor]:
        """The updated weight is fp32."""
        layer.require_finite(statistics)
        pruned, keep = self._method.prune(layer, statistics if self._method.Statistics else None)
        hessian, _ = statistics.damped(layer.spec.damping)
        return torch.cat([refit(weight, values, bits, hessian)
                          for weight, values, bits in panels(layer.weight, pruned, keep)]), keep


def build_pruner(spec: PruneConfig) -> Pruner:
    """Raises UserError for options that the method does not have, and where it cannot be refitted."""
    kind = PRUNERS.load(spec.method)
    method = kind(read_options(kind.Options, spec.options, "prune.options", f"prune.method={spec.method}"))
    if not spec.refits:
        return method
    if kind.Statistics not in (None, ColumnNorms, Hessian):
        raise UserError(f"prune.refit: prune.method={spec.method} prunes by {kind.Statistics.__name__}, and only the "
                        "Hessian would be collected; leave prune.refit out")
    return Refitted(method)
