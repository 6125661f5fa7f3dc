"""Native CPU kernels for sparse weights, and their torch reference.

    expand, compact          training and prefill: (values, bits) -> dense and back
    PackedMatrix.matvec      decoding: y = W x with W decompressed in registers, FP32 or INT8
    read_bandwidth           what the memory gives, for the byte bound
    backend, use_backend     which instructions run: avx512 (VBMI2, VNNI) or portable

Tensors elsewhere than on the CPU, and dtypes the native code does not move, take the reference.
"""

import contextlib
import os
from collections.abc import Iterator

import torch

from sparse_train.kernels import reference
from sparse_train.kernels.reference import pack, unpack

try:
    from sparse_train.kernels import _native
except ImportError as error:
    raise ImportError("the native kernels are not built; run `make setup`, or pip install --no-build-isolation -e . "
                      f"in the repository ({error})") from error

__all__ = [
    "PackedMatrix", "backend", "backends", "compact", "expand", "pack", "read_bandwidth", "unpack", "use_backend",
]

_BACKENDS = ("avx512", "portable") if _native.has_avx512() else ("portable",)
_MOVED = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


def backends() -> tuple[str, ...]:
    """What this CPU can run, fastest first."""
    return _BACKENDS


def backend() -> str:
    return "avx512" if _native.uses_avx512() else "portable"


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
    if name not in _BACKENDS:
        raise ValueError(f"this CPU has no backend {name!r}; choose one of: {', '.join(_BACKENDS)}")
    _native.use_avx512(name == "avx512")


if "SPARSE_TRAIN_ISA" in os.environ:
    _set_backend(os.environ["SPARSE_TRAIN_ISA"])


def expand(values: torch.Tensor, bitmask: torch.Tensor, num_columns: int,
           out: torch.Tensor | None = None) -> torch.Tensor:
    """(values (nnz,), bitmask (R, 8 * ceil(C / 64))) -> dense (R, C) of the values' dtype, +0 where pruned.

    `out` is a contiguous tensor to write to. Raises ValueError when bits and values do not belong together.
    """
    if values.device.type != "cpu" or values.dtype not in _MOVED:
        dense = reference.expand(values, bitmask, num_columns)
        return dense if out is None else out.copy_(dense)
    _check_bits(bitmask, num_columns)
    values, bitmask = values.contiguous(), bitmask.contiguous()
    dense = _target(out, (len(bitmask), num_columns), values.dtype)
    _native.expand(values.data_ptr(), bitmask.data_ptr(), dense.data_ptr(), len(bitmask), num_columns, values.numel(),
                   values.element_size(), torch.get_num_threads())
    return dense


def compact(dense: torch.Tensor, bitmask: torch.Tensor, num_values: int | None = None,
            out: torch.Tensor | None = None) -> torch.Tensor:
    """Dense (R, C) -> its entries at the kept positions, row-major (nnz,).

    `num_values` is nnz where the caller knows it, `out` (nnz,) a contiguous tensor to write to. Raises ValueError when
    they do not fit what the bits say.
    """
    if dense.device.type != "cpu" or dense.dtype not in _MOVED:
        values = reference.compact(dense, bitmask)
        return values if out is None else out.copy_(values)
    num_rows, num_columns = dense.shape
    _check_bits(bitmask, num_columns, num_rows)
    dense, bitmask = dense.contiguous(), bitmask.contiguous()
    if num_values is None and out is None:
        num_values = _native.count_kept(bitmask.data_ptr(), bitmask.numel())
    values = _target(out, (num_values if out is None else out.numel(),), dense.dtype)
    num_values = values.numel()
    _native.compact(dense.data_ptr(), bitmask.data_ptr(), values.data_ptr(), num_rows, num_columns, num_values,
                    dense.element_size(), torch.get_num_threads())
    return values


class PackedMatrix:
    """A sparse weight laid out for batch-1 products on the CPU.

    `values` (nnz,) float32, bfloat16 or float16 (kept as float32), or int8 with `scale` (R,) float32; `bitmask`
    (R, 8 * ceil(C / 64)) uint8. INT8 products quantise x to 8 bits per call. Raises ValueError for what does not fit.
    """

    def __init__(self, values: torch.Tensor, bitmask: torch.Tensor, num_columns: int,
                 scale: torch.Tensor | None = None):
        _check_bits(bitmask, num_columns)
        self.shape = (len(bitmask), num_columns)
        self._scale = scale
        if (values.dtype == torch.int8) != (scale is not None):
            raise ValueError(f"values are {values.dtype} and scale is {'missing' if scale is None else 'given'}; "
                             "int8 values have a scale per row, others have none")
        if scale is None:
            values = values.float()
        else:
            self._scale = scale = scale.float().contiguous()
            if scale.shape != (len(bitmask),):
                raise ValueError(f"scale has shape {tuple(scale.shape)}, it needs ({len(bitmask)},): one per row")
        values, bitmask = values.contiguous(), bitmask.contiguous()
        self._packed = _native.Packed(values.data_ptr(), bitmask.data_ptr(), 0 if scale is None else scale.data_ptr(),
                                      *self.shape, values.numel(), torch.get_num_threads())

    @property
    def num_bytes(self) -> int:
        """Bytes that one matvec reads: values and bits, for int8 scales and row sums."""
        return self._packed.num_bytes

    def matvec(self, x: torch.Tensor) -> torch.Tensor:
        """`x` (C,) float32, or any shape with C entries -> (R,) float32."""
        if x.numel() != self.shape[1] or x.dtype != torch.float32 or x.device.type != "cpu":
            raise ValueError(f"x is {x.dtype} {tuple(x.shape)} on {x.device}; it needs {self.shape[1]} float32 numbers "
                             "on the cpu")
        x = x.contiguous()
        y = torch.empty(self.shape[0])
        self._packed.matvec(x.data_ptr(), y.data_ptr(), torch.get_num_threads())
        return y

    def to_dense(self) -> torch.Tensor:
        """(R, C) float32, int8 values times their scale: for products with many rows at once."""
        dense = torch.empty(self.shape, dtype=torch.float32 if self._scale is None else torch.int8)
        self._packed.expand(dense.data_ptr(), torch.get_num_threads())
        return dense if self._scale is None else dense * self._scale[:, None]


def read_bandwidth(num_bytes: int = 1 << 29, num_threads: int | None = None, repeats: int = 7) -> float:
    """Bytes per second of a streaming read by all threads, the median of `repeats` passes over `num_bytes`.

    Take a size well above the last-level cache. It is the bound for a kernel whose every byte is read once.
    """
    return _native.read_bandwidth(num_bytes, num_threads or torch.get_num_threads(), repeats)


def _target(out: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if out is None:
        return torch.empty(shape, dtype=dtype)
    if out.shape != shape or out.dtype != dtype or not out.is_contiguous() or out.device.type != "cpu":
        raise ValueError(f"out is {out.dtype} {tuple(out.shape)} on {out.device}; it must be a contiguous {dtype} "
                         f"{shape} on the cpu")
    return out


def _check_bits(bitmask: torch.Tensor, num_columns: int, num_rows: int | None = None) -> None:
    num_rows = len(bitmask) if num_rows is None else num_rows
    needed = (num_rows, 8 * -(-num_columns // 64))
    if bitmask.dtype != torch.uint8 or bitmask.shape != needed or bitmask.device.type != "cpu":
        raise ValueError(f"the bitmask is {bitmask.dtype} {tuple(bitmask.shape)} on {bitmask.device}; a weight of "
                         f"shape ({num_rows}, {num_columns}) on the cpu needs uint8 {needed}")
