"""`prune`: the method, the sparsity and its pattern, the calibration data (sparse_train/pruning)."""

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from sparse_train.config.base import Positive, Section
from sparse_train.config.task import TaskConfig


class PruneConfig(Section):
    method: Literal["magnitude", "sparsegpt"] = "sparsegpt"
    sparsity: float | tuple[float, ...] | None = None
    """The fraction of each prunable weight that becomes zero, uniform over layers; an N:M pattern implies it. A list,
    ascending, is a chain: each level is pruned from the fine-tuned weights of the one before."""
    pattern: str = "unstructured"
    """unstructured, or N:M: N kept of every M along a row."""
    num_calibration: Positive = 128
    """Training examples whose activations make the Hessians (sparsegpt)."""
    calibration: TaskConfig | None = None
    """Whose training examples they are; None: the run's task. {name: text, path: ...} is general text."""
    batch_size: Positive = 16
    """Calibration examples per forward pass."""
    damping: Annotated[float, Field(gt=0)] = 0.01
    """Added to the Hessian's diagonal, as a fraction of its mean."""
    block_size: Positive = 128
    """Columns whose bits are chosen together (sparsegpt, unstructured)."""

    @property
    def levels(self) -> tuple["PruneConfig", ...]:
        """One config per sparsity, in the order of the chain."""
        several = self.sparsity if isinstance(self.sparsity, tuple) else (self.sparsity,)
        return tuple(self.model_copy(update={"sparsity": sparsity}) for sparsity in several)

    @property
    def group(self) -> tuple[int, int] | None:
        """(N, M) of an N:M pattern, None when unstructured."""
        if self.pattern == "unstructured":
            return None
        num_kept, size = self.pattern.split(":")
        return int(num_kept), int(size)

    @model_validator(mode="after")
    def _pattern_and_sparsity_agree(self):
        if self.pattern == "unstructured":
            if self.sparsity is None:
                raise ValueError("sparsity is missing; give a number in [0, 1)")
            levels = [level.sparsity for level in self.levels]
            for sparsity in levels:
                if not 0 <= sparsity < 1:
                    raise ValueError(f"sparsity={sparsity} is outside [0, 1); 0.75 removes three weights of four")
            if not levels or sorted(set(levels)) != levels:
                raise ValueError(f"sparsity={levels} is no chain; give levels that rise, such as [0.5, 0.75]")
            return self
        if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", self.pattern):
            raise ValueError(f"pattern={self.pattern!r} is neither unstructured nor N:M, such as 2:4")
        num_kept, size = self.group
        if num_kept > size:
            raise ValueError(f"pattern={self.pattern} keeps more than it has; N:M keeps N of every M")
        implied = 1 - num_kept / size
        if isinstance(self.sparsity, tuple):
            raise ValueError(f"pattern={self.pattern} has one sparsity, {implied:g}; a chain needs "
                             "pattern=unstructured")
        if self.sparsity is not None and abs(self.sparsity - implied) > 1e-9:
            raise ValueError(f"sparsity={self.sparsity} contradicts pattern={self.pattern}, which makes {implied:g}; "
                             "leave sparsity out (prune.sparsity=null)")
        object.__setattr__(self, "sparsity", implied)
        return self
