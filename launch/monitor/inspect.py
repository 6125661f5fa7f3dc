"""sparse-train inspect: the tensors of a checkpoint folder."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from sparse_train.errors import UserError, printable
from sparse_train.sparse import TensorFolder
from sparse_train.sparse.header import NUM_BYTES, PARTS
from sparse_train.tables import print_table


@dataclass(frozen=True)
class _Row:
    name: str
    shape: tuple[int, ...]
    dtype: str
    sparsity: float
    num_bytes: int
    dense_bytes: int

    def cells(self) -> list[str]:
        return [printable(self.name), "x".join(map(str, self.shape)), self.dtype, f"{self.sparsity:.4f}",
                f"{self.num_bytes:,}"]


def print_folder(folder: Path, console: Console) -> None:
    """Raises UserError where there is no folder, or no checkpoint in it."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    rows = list(_rows(TensorFolder(folder)))
    print_table(console, ("tensor", "shape", "dtype", "sparsity", "bytes"), [row.cells() for row in rows], num_left=3)
    total = sum(row.num_bytes for row in rows)
    share = total / max(1, sum(row.dense_bytes for row in rows))
    console.print(f"{total:,} bytes, {share:.3f} of the same tensors dense", highlight=False)


def _rows(tensors: TensorFolder) -> Iterator[_Row]:
    for name, shape in tensors.shapes.items():
        parts = [tensors.spec(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in tensors]
        (num_kept,), dtype = parts[0]
        num_weights = math.prod(shape)
        yield _Row(name, shape, dtype, 1 - num_kept / num_weights, sum(_num_bytes(*part) for part in parts),
                   num_weights * NUM_BYTES[dtype])
    for name in tensors.names:
        dense_shape, dtype = tensors.spec(name)
        num_zeros = int((tensors.get(name) == 0).sum())
        num_bytes = _num_bytes(dense_shape, dtype)
        yield _Row(name, dense_shape, dtype, num_zeros / max(1, math.prod(dense_shape)), num_bytes, num_bytes)


def _num_bytes(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * NUM_BYTES[dtype]
