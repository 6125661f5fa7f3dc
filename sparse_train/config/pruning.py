"""`prune`: the method, the sparsity and its pattern, which linears, the calibration data (sparse_train/pruning)."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from sparse_train.config.base import Positive, Section
from sparse_train.config.task import TaskConfig
from sparse_train.registry import PRUNERS

_Fraction = Annotated[float, Field(ge=0, lt=1)]


class ReconstructionConfig(Section):
    steps: Annotated[int, Field(ge=0)] = 0
    """Of Adam, each on one calibration batch; 0: the values stay those of the method."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Of the first step; it falls linearly to zero."""


class PruneConfig(Section):
    method: Annotated[str, AfterValidator(PRUNERS.check)] = "admm"
    """One of the table PRUNERS of sparse_train/registry.py. The default is what was best for its time on a pretrained
    model (docs/benchmarks.md, "Methods by score")."""
    sparsity: float | tuple[float, ...] | None = None
    """The fraction of each prunable weight that becomes zero, uniform over layers; an N:M pattern implies it. A list,
    ascending, is a chain: each level is pruned from the fine-tuned weights of the one before."""
    pattern: str = "unstructured"
    """unstructured, or N:M: N kept of every M along a row."""
    targets: tuple[str, ...] | None = None
    """Of the linears that the model's family prunes, only those whose module names match one of these patterns, such as
    "*.mlp.*" (* stands for any text, ? for a character); None: all of them."""
    ignore: tuple[str, ...] = ()
    """Patterns of the names of linears that stay dense."""
    layer_sparsity: dict[str, _Fraction] = {}  # noqa: RUF012 - pydantic copies it
    """Pattern of names -> the sparsity of the linears that it matches, in place of prune.sparsity. Of several patterns
    that match one linear the longest counts."""
    allocation: Literal["uniform", "owl", "atp"] = "uniform"
    """How sparsity is divided over the blocks; the model keeps exactly as many weights as with uniform. owl: blocks
    with a larger share of outliers keep more. atp: later blocks keep less, in equal steps."""
    allocation_spread: Annotated[float, Field(gt=0, lt=0.5)] = 0.08
    """Half the difference between the sparsest block and the least sparse one (owl, atp)."""
    outlier_factor: Annotated[float, Field(gt=0)] = 5.0
    """A weight is an outlier if |w| times its input's norm is over so many times the mean of its block (owl)."""
    num_calibration: Positive = 128
    """Training examples whose activations the method sees (all but magnitude), refit, allocation=owl and
    compress.rounding=compensated; those of obert give it a gradient each."""
    calibration: TaskConfig | None = None
    """Whose training examples they are; None: the run's task. {name: text, path: ...} is general text."""
    batch_size: Positive = 16
    """Calibration examples per forward pass."""
    refit: bool | None = None
    """Whether the bits of the method get the values with the least error of the layer's outputs; None: true
    for admm and alps, false for the others. With magnitude and wanda it needs calibration data and a Hessian, as
    sparsegpt does; obert has none and is not refitted."""
    damping: Annotated[float, Field(gt=0)] = 0.01
    """Added to the Hessian's diagonal, as a fraction of its mean (sparsegpt, admm, alps, refit,
    compress.rounding=compensated), or to that of each row of obert's Fisher matrix."""
    block_size: Positive = 128
    """Columns whose bits are chosen together (sparsegpt, unstructured)."""
    reconstruction: ReconstructionConfig = ReconstructionConfig()
    """Training of a pruned block's values, until its output is near that of the dense block."""
    options: dict[str, Any] = {}  # noqa: RUF012
    """Settings of admm, alps or obert, or of a method that another package adds; the method's own schema checks
    them."""

    @property
    def levels(self) -> tuple["PruneLevel", ...]:
        """One per sparsity, in the order of the chain."""
        sparsities = self.sparsity if isinstance(self.sparsity, tuple) else (self.sparsity,)
        return tuple(PruneLevel.model_construct(**{**dict(self), "sparsity": sparsity}) for sparsity in sparsities)

    @property
    def refits(self) -> bool:
        """`refit`, of which None is the method's own."""
        return PRUNERS.entries[self.method].refits if self.refit is None else self.refit

    @property
    def calibrates(self) -> bool:
        """Whether pruning reads training examples."""
        return PRUNERS.entries[self.method].calibrates or self.refits or self.allocation == "owl" or \
            self.reconstruction.steps > 0

    @property
    def group(self) -> tuple[int, int] | None:
        """(N, M) of an N:M pattern, None when unstructured."""
        return _parse_group(self.pattern)

    @model_validator(mode="before")
    @classmethod
    def _sparsity_of_the_pattern(cls, keys: Any) -> Any:
        """Also in place of a rounded one, such as 0.3333333333: two configs of one pattern are the same config."""
        group = _parse_group(keys.get("pattern")) if isinstance(keys, dict) else None
        if group is None:
            return keys
        implied, sparsity = 1 - group[0] / group[1], keys.get("sparsity")
        agrees = sparsity is None or (isinstance(sparsity, float) and abs(sparsity - implied) <= 1e-9)
        return {**keys, "sparsity": implied} if agrees else keys

    @model_validator(mode="after")
    def _pattern_and_sparsity_agree(self) -> "PruneConfig":
        if self.group:
            self._check_group(*self.group)
        elif self.pattern != "unstructured":
            raise ValueError(f"pattern={self.pattern!r} is neither unstructured nor N:M, such as 2:4")
        else:
            self._check_sparsities()
        return self

    def _check_group(self, num_kept: int, size: int) -> None:
        if num_kept > size:
            raise ValueError(f"pattern={self.pattern} keeps more than it has; N:M keeps N of every M")
        implied = 1 - num_kept / size
        if isinstance(self.sparsity, tuple):
            raise ValueError(f"pattern={self.pattern} has one sparsity, {implied:g}; a chain needs "
                             "pattern=unstructured")
        if self.sparsity != implied:
            raise ValueError(f"sparsity={self.sparsity} contradicts pattern={self.pattern}, which makes {implied:g}; "
                             "leave sparsity out (prune.sparsity=null)")
        if self.layer_sparsity:
            raise ValueError(f"layer_sparsity and pattern={self.pattern}, which makes every layer {implied:g} sparse, "
                             "exclude each other; use pattern=unstructured, or prune.ignore for layers that stay dense")
        if self.allocation != "uniform":
            raise ValueError(f"allocation={self.allocation} and pattern={self.pattern}, which makes every layer "
                             f"{implied:g} sparse, exclude each other; use pattern=unstructured")

    def _check_sparsities(self) -> None:
        if self.sparsity is None:
            raise ValueError("sparsity is missing; give a number in [0, 1)")
        sparsities = [level.sparsity for level in self.levels]
        for sparsity in sparsities:
            if not 0 <= sparsity < 1:
                raise ValueError(f"sparsity={sparsity} is outside [0, 1); 0.75 removes three weights of four")
        if not sparsities or sorted(set(sparsities)) != sparsities:
            raise ValueError(f"sparsity={sparsities} is no chain; give levels that rise, such as [0.5, 0.75]")
        if self.layer_sparsity and isinstance(self.sparsity, tuple):
            raise ValueError("layer_sparsity gives a layer one sparsity, and a chain has several levels; give one "
                             "prune.sparsity, or leave layer_sparsity out")
        if self.allocation == "uniform":
            return
        if self.layer_sparsity:
            raise ValueError(f"layer_sparsity and allocation={self.allocation} both decide the sparsity of a layer; "
                             "leave one of them out")
        if self.allocation == "atp" and sparsities[-1] + self.allocation_spread >= 1:  # owl: allocate, from shares
            raise ValueError(f"allocation_spread={self.allocation_spread} leaves nothing of the sparsest blocks at "
                             f"sparsity={sparsities[-1]}; give less than {1 - sparsities[-1]:g}")


class PruneLevel(PruneConfig):
    """One level of a chain, or one layer of it."""

    sparsity: float


def _parse_group(pattern: Any) -> tuple[int, int] | None:
    found = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", pattern) if isinstance(pattern, str) else None
    return (int(found[1]), int(found[2])) if found else None
