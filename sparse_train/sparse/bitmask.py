"""BitmaskTensor: a sparse weight as (values, bitmask, shape).

    keep (R, C) bool  ->  bitmask (R, 8 * ceil(C / 64)) uint8: bit k % 8 of byte k // 8 says column k is kept
    dense (R, C)      ->  values (nnz,): the kept entries, row after row

Rows are padded to whole 64-bit words so that a row starts at a word; padding bits are 0. A kept value may be 0.0: only
the bits say what is pruned, so training through zero loses nothing.
"""

from dataclasses import dataclass

import torch

from sparse_train import kernels


@dataclass(frozen=True)
class BitmaskTensor:
    values: torch.Tensor
    """(nnz,), any floating dtype or int8: kept entries in row-major order."""
    bitmask: torch.Tensor
    """(R, 8 * ceil(C / 64)) uint8."""
    shape: tuple[int, int]
    """(R, C), as `nn.Linear.weight`: (out_features, in_features)."""

    @classmethod
    def from_dense(cls, dense: torch.Tensor, keep: torch.Tensor | None = None) -> "BitmaskTensor":
        """`dense` (R, C); `keep` (R, C) bool, True where a weight is kept, by default wherever dense is not 0.

        Raises ValueError for other shapes.
        """
        if dense.ndim != 2:
            raise ValueError(f"a sparse weight has two dimensions, this one has shape {tuple(dense.shape)}")
        keep = dense != 0 if keep is None else keep
        if keep.shape != dense.shape:
            raise ValueError(f"keep has shape {tuple(keep.shape)}, the weight {tuple(dense.shape)}; they must be equal")
        return cls(dense[keep], kernels.pack(keep), (dense.shape[0], dense.shape[1]))

    def to_dense(self) -> torch.Tensor:
        """(R, C) with exactly +0.0 at every pruned position."""
        return kernels.expand(self.values, self.bitmask, self.shape[1])

    @property
    def keep(self) -> torch.Tensor:
        """(R, C) bool, True where a weight is kept."""
        return kernels.unpack(self.bitmask, self.shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """Of the values, as `nn.Linear.weight.dtype`."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def sparsity(self) -> float:
        """The fraction of positions that is pruned."""
        return 1 - self.values.numel() / (self.shape[0] * self.shape[1])

    @property
    def num_bytes(self) -> int:
        """Of values and bitmask."""
        return self.values.nbytes + self.bitmask.nbytes
