"""sparse-train inspect: what a checkpoint folder holds."""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sparse_train.errors import UserError, printable
from sparse_train.sparse import TensorFolder
from sparse_train.sparse.header import NUM_BYTES, PARTS


def print_folder(folder: Path, console: Console) -> None:
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    tensors = TensorFolder(folder)
    table = Table(box=None, header_style="bold")
    for title in ("tensor", "shape", "dtype"):
        table.add_column(title, no_wrap=True)
    for title in ("sparsity", "bytes"):
        table.add_column(title, justify="right", no_wrap=True)
    total = dense_total = 0
    for name, shape, dtype, sparsity, num_bytes, dense_bytes in _rows(tensors):
        total, dense_total = total + num_bytes, dense_total + dense_bytes
        table.add_row(Text(printable(name)), "x".join(map(str, shape)), dtype, f"{sparsity:.4f}", f"{num_bytes:,}")
    console.print(table, soft_wrap=True)
    console.print(f"{total:,} bytes, {total / max(1, dense_total):.3f} of the same tensors dense", highlight=False)


def _rows(tensors: TensorFolder):
    for name, shape in tensors.shapes.items():
        parts = [tensors.spec(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in tensors]
        (num_kept,), dtype = parts[0]
        num_weights = shape[0] * shape[1]
        yield (name, shape, dtype, 1 - num_kept / num_weights, sum(_num_bytes(*part) for part in parts),
               num_weights * NUM_BYTES[dtype])
    for name in tensors.names:
        stored_shape, dtype = tensors.spec(name)
        num_zeros = int((tensors.get(name) == 0).sum())
        num_bytes = _num_bytes(stored_shape, dtype)
        yield name, stored_shape, dtype, num_zeros / max(1, num_bytes // NUM_BYTES[dtype]), num_bytes, num_bytes


def _num_bytes(shape: tuple[int, ...], dtype: str) -> int:
    count = NUM_BYTES[dtype]
    for size in shape:
        count *= size
    return count
