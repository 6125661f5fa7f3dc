"""Native CPU kernels for sparse weights, and their torch reference.

    expand, compact          training and prefill: (values, bits) -> dense and back
    PackedMatrix.matvec      decoding: y = W x with W decompressed in registers, FP32 or INT8
    PackedMatrix.matmul      prompts: the same for many x at once, by a dense product
    read_bandwidth           what the memory gives, for the byte bound
    backend, use_backend     which instructions run: avx512 (VBMI2, VNNI) or portable
    PORTABLE_NOTE            what to tell where the portable ones run

Tensors elsewhere than on the CPU, and dtypes the native code does not move, take the reference.
"""

import contextlib
import os
from collections.abc import Iterator

import torch
from torch.nn import functional

from sparse_train.errors import UserError
from sparse_train.kernels import reference
from sparse_train.kernels.arguments import CPU, check_bits, check_count, check_tensor, describe
from sparse_train.kernels.reference import pack, unpack

try:
    from sparse_train.kernels import _native
except ImportError as error:
    raise ImportError("the native kernels are not built; run `make setup`, or pip install --no-build-isolation -e . "
                      f"in the repository ({error})") from error

__all__ = [
    "PORTABLE_NOTE", "PackedMatrix", "backend", "backends", "compact", "expand", "pack", "read_bandwidth", "unpack",
    "use_backend",
]

PORTABLE_NOTE = ("portable kernels: without AVX-512 (VBMI2, VNNI) sparse products are computed one value after the "
                 "other; dense torch may be faster")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_MOVED = (*_FLOATS, torch.int8)
_MOST_THREADS = 4096


def backends() -> tuple[str, ...]:
    """What this CPU can run, fastest first."""
    return tuple(_native.tiers())


def backend() -> str:
    """The one that is used, by default the fastest."""
    return _native.tier()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend for a while (not per thread). Raises ValueError for one that this CPU lacks."""
    before = backend()
    _set_backend(name)
    try:
        yield
    finally:
        _set_backend(before)


def _set_backend(name: str) -> None:
    if name not in backends():
        raise ValueError(f"this CPU has no backend {name!r}; choose one of: {', '.join(backends())}")
    _native.use_tier(name)


if forced := os.environ.get("SPARSE_TRAIN_ISA"):
    try:
        _set_backend(forced)
    except ValueError as error:
        raise UserError(f"SPARSE_TRAIN_ISA={forced}: {error}") from None


def expand(values: torch.Tensor, bitmask: torch.Tensor, num_columns: int,
           out: torch.Tensor | None = None) -> torch.Tensor:
    """(values (nnz,), bitmask (R, 8 * ceil(C / 64))) -> dense (R, C) of the values' dtype, +0 where pruned.

    `out` is a contiguous tensor to write to. Autograd does not see what is moved. Raises ValueError for arguments that
    do not fit and, on the CPU, when bits and values do not belong together.
    """
    check_tensor("values", values, None)
    check_bits(bitmask, num_columns, device=values.device)
    target = _target(out, (len(bitmask), num_columns), values)
    if not _is_moved(values):
        dense = reference.expand(values, bitmask, num_columns)
        return dense if out is None else target.copy_(dense)
    values, bitmask = _plain(values), _plain(bitmask)
    _native.expand(values.data_ptr(), bitmask.data_ptr(), target.data_ptr(), len(bitmask), num_columns, values.numel(),
                   values.element_size(), torch.get_num_threads())
    return target


def compact(dense: torch.Tensor, bitmask: torch.Tensor, num_values: int | None = None,
            out: torch.Tensor | None = None) -> torch.Tensor:
    """Dense (R, C) -> its entries at the kept positions, row-major (nnz,).

    `num_values` is nnz where the caller knows it, `out` (nnz,) a contiguous tensor to write to. Autograd does not see
    what is moved. Raises ValueError for arguments that do not fit and, on the CPU, for a wrong nnz.
    """
    check_tensor("dense", dense, None, None)
    num_rows, num_columns = dense.shape
    check_bits(bitmask, num_columns, num_rows, dense.device)
    if num_values is not None:
        check_count("num_values", num_values, 0, dense.numel())
    if not _is_moved(dense):
        values = reference.compact(dense, bitmask)
        return values if out is None else _target(out, values.shape, dense).copy_(values)
    dense, bitmask = _plain(dense), _plain(bitmask)
    if out is not None:
        num_values = out.numel() if num_values is None else num_values
    elif num_values is None:
        num_values = _native.count_kept(bitmask.data_ptr(), bitmask.numel())
    values = _target(out, (num_values,), dense)
    _native.compact(dense.data_ptr(), bitmask.data_ptr(), values.data_ptr(), num_rows, num_columns, num_values,
                    dense.element_size(), torch.get_num_threads())
    return values


class PackedMatrix:
    """A sparse weight laid out for batch-1 products on the CPU; inference only.

    `values` (nnz,) float32, bfloat16 or float16 (kept as float32), or int8 with `scale` (R,) floating; `bitmask`
    (R, 8 * ceil(C / 64)) uint8. INT8 products quantise each x to 8 bits. Raises ValueError for what does not fit.
    """

    def __init__(self, values: torch.Tensor, bitmask: torch.Tensor, num_columns: int,
                 scale: torch.Tensor | None = None):
        check_tensor("values", values, None, device=CPU, dtypes=_MOVED)
        check_bits(bitmask, num_columns)
        if (values.dtype == torch.int8) != (scale is not None):
            raise ValueError(f"values are {values.dtype} and scale is {'missing' if scale is None else 'given'}; "
                             "int8 values have a scale per row, others have none")
        if scale is not None:
            check_tensor("scale", scale, len(bitmask), device=CPU, dtypes=_FLOATS)
            scale = _plain(scale.float())
        values, bitmask = _plain(values if scale is not None else values.float()), _plain(bitmask)
        self.shape = (len(bitmask), num_columns)
        self._scale = scale
        self._packed = _native.Packed(values.data_ptr(), bitmask.data_ptr(), 0 if scale is None else scale.data_ptr(),
                                      *self.shape, values.numel(), scale is not None, torch.get_num_threads())

    @property
    def num_bytes(self) -> int:
        """Bytes that one matvec reads: values and bits, for int8 scales and row sums."""
        return self._packed.num_bytes

    def matvec(self, x: torch.Tensor) -> torch.Tensor:
        """`x` (C,) float32, or any shape with C entries -> (R,) float32.

        An x that is not finite makes every row Inf or NaN, as in a dense product, where 0 * Inf counts as well.
        """
        if (not isinstance(x, torch.Tensor) or x.numel() != self.shape[1] or x.dtype != torch.float32
                or x.device != CPU or x.layout != torch.strided):
            raise ValueError(f"x is {describe(x)}; it needs {self.shape[1]} float32 numbers on the cpu")
        x = _plain(x)
        y = torch.empty(self.shape[0])
        if self._packed.matvec(x.data_ptr(), y.data_ptr(), torch.get_num_threads()):
            return y
        return self.to_dense() @ x.flatten()

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """`x` (..., C) float32 -> (..., R): matvec of each row, by one dense product, which is what many rows need."""
        if self._scale is None:
            return functional.linear(x, self.to_dense())
        codes, step = reference.quantise(x)
        return functional.linear(codes, self._expanded().float()) * (step * self._scale)

    def to_dense(self) -> torch.Tensor:
        """(R, C) float32, int8 values times their scale: for products with many rows at once."""
        dense = self._expanded()
        return dense if self._scale is None else dense * self._scale[:, None]

    def _expanded(self) -> torch.Tensor:
        """(R, C) as the values are stored."""
        dense = torch.empty(self.shape, dtype=torch.float32 if self._scale is None else torch.int8)
        self._packed.expand(dense.data_ptr(), torch.get_num_threads())
        return dense


def read_bandwidth(num_bytes: int = 1 << 29, num_threads: int | None = None, repeats: int = 7) -> float:
    """Bytes per second of a streaming read by all threads, the median of `repeats` passes over `num_bytes`.

    Take a size well above the last-level cache. It is the bound for a kernel whose every byte is read once. Raises
    ValueError for numbers that leave nothing to measure.
    """
    num_threads = torch.get_num_threads() if num_threads is None else num_threads
    check_count("num_threads", num_threads, 1, _MOST_THREADS)
    check_count("num_bytes", num_bytes, 512 * num_threads)
    check_count("repeats", repeats, 1, 1 << 20)
    return _native.read_bandwidth(num_bytes, num_threads, repeats)


def _is_moved(tensor: torch.Tensor) -> bool:
    """Whether native code moves it, and not the reference."""
    return tensor.device == CPU and tensor.dtype in _MOVED


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, one after the other in memory."""
    return tensor.resolve_neg().contiguous()


def _target(out: torch.Tensor | None, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    if out is None:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    check_tensor("out", out, *shape, device=like.device, dtypes=(like.dtype,))
    if not out.is_contiguous() or out.is_neg():
        raise ValueError(f"out is {describe(out)}, but not contiguous; results are written to consecutive memory")
    return out
