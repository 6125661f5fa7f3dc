"""sparse-train inspect: the tensors of a checkpoint folder."""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from sparse_train.errors import UserError, printable
from sparse_train.tables import print_table

if TYPE_CHECKING:  # torch takes seconds to import, and the command line imports this module
    from sparse_train.sparse import TensorFolder


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


def add_inspect(commands: "argparse._SubParsersAction[Any]") -> None:
    inspect = commands.add_parser("inspect", help="tensors, shapes, sparsity and bytes of a checkpoint folder")
    inspect.add_argument("folder", type=Path, metavar="FOLDER")
    inspect.set_defaults(command=_inspect)


def _inspect(options: argparse.Namespace, console: Console) -> None:
    """Raises UserError where there is no folder, or no checkpoint in it."""
    from sparse_train.sparse import TensorFolder

    if not options.folder.is_dir():
        raise UserError(f"there is no folder {options.folder}")
    rows = list(_rows(TensorFolder(options.folder)))
    print_table(console, ("tensor", "shape", "dtype", "sparsity", "bytes"), [row.cells() for row in rows], num_left=3)
    total = sum(row.num_bytes for row in rows)
    share = total / max(1, sum(row.dense_bytes for row in rows))
    console.print(f"{total:,} bytes, {share:.3f} of the same tensors dense", highlight=False)


def _rows(tensors: "TensorFolder") -> Iterator[_Row]:
    from sparse_train.sparse.header import INT4, NUM_BYTES, PARTS

    for name, shape in tensors.shapes.items():
        parts = [tensors.spec(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in tensors]
        (num_kept,), dtype = parts[0]
        num_weights = math.prod(shape)
        dense_bytes = num_weights * NUM_BYTES[dtype]
        num_bytes = sum(math.prod(part_shape) * NUM_BYTES[part_dtype] for part_shape, part_dtype in parts)
        if dtype == INT4:  # only the bits tell how many codes there are
            num_kept, dtype, dense_bytes = tensors.num_kept(name), "I4", num_weights // 2
        yield _Row(name, shape, dtype, 1 - num_kept / num_weights, num_bytes, dense_bytes)
    for name in tensors.names:
        dense_shape, dtype = tensors.spec(name)
        num_weights, num_zeros = math.prod(dense_shape), int((tensors.get(name) == 0).sum())
        num_bytes = num_weights * NUM_BYTES[dtype]
        yield _Row(name, dense_shape, dtype, num_zeros / max(1, num_weights), num_bytes, num_bytes)
