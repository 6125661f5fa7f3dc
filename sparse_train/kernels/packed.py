"""PackedMatrix: the operand of inference, in the memory of native code."""

import ctypes
import functools
import itertools
import time
import weakref
from collections.abc import Callable
from typing import Self

import numpy as np
import torch
from torch.nn import functional

from sparse_train.kernels import reference
from sparse_train.kernels.arguments import CPU, check_bits, check_count, check_tensor, consecutive, describe
from sparse_train.kernels.native import FLOATS, _native, backend
from sparse_train.kernels.ops import OPS, define_operator

# Operators take tensors and numbers. A number is given once, so that a compiled graph never meets another matrix.
_numbers = itertools.count()
_matrices: weakref.WeakValueDictionary[int, "PackedMatrix"] = weakref.WeakValueDictionary()

_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.int8: "int8"}


class PackedMatrix:
    """A sparse weight laid out for products with a few vectors on the CPU; inference only.

    `values` (nnz,) float32, bfloat16, float16 (kept as float32), int8 with `scale` (R,) floating, or INT4: int8 codes
    in -8..7 with `scale` (R, ceil(C / GROUP)) bfloat16; `bitmask` (R, 8 * ceil(C / 64)) uint8. Products of integers
    quantise each x to 8 bits. Raises ValueError for what does not fit.
    """

    def __init__(self, values: torch.Tensor, bitmask: torch.Tensor, num_columns: int,
                 scale: torch.Tensor | None = None):
        scale, is_int4 = check_weight(values, bitmask, num_columns, scale, FLOATS, CPU)
        values, bitmask = consecutive(values.float() if values.dtype == torch.float16 else values), consecutive(bitmask)
        self._hold(_native.Packed(values.data_ptr(), bitmask.data_ptr(), 0 if scale is None else scale.data_ptr(),
                                  len(bitmask), num_columns, values.numel(), values.element_size(), is_int4,
                                  torch.get_num_threads()))

    @classmethod
    def from_block(cls, block: memoryview) -> Self:
        """One whose `block` was this, maybe in another process. Raises ValueError where the size is another one; its
        numbers are not checked, so take it from nobody else."""
        matrix, memory = cls.__new__(cls), np.frombuffer(block, np.uint8)
        matrix._hold(_native.Packed(memory.ctypes.data, memory.nbytes), memory)
        return matrix

    def _hold(self, packed: _native.Packed, memory: object = None) -> None:
        self._packed, self._memory = packed, memory
        self.shape = (packed.num_rows, packed.num_columns)
        self.density = packed.num_values / max(1, self.shape[0] * self.shape[1])
        self._stored = {4: torch.float32, 2: torch.bfloat16, 1: torch.int8}[packed.size]
        self.precision = "int4" if packed.is_int4 else _PRECISIONS[self._stored]
        self._number = next(_numbers)
        _matrices[self._number] = self

    @property
    def block(self) -> memoryview:
        """All that products read, as one piece of memory that lasts as long as the matrix. `from_block` takes a copy of
        it on any instruction set of this kind of processor."""
        address, num_bytes = self._packed.block
        return memoryview((ctypes.c_ubyte * num_bytes).from_address(address))

    def _scale(self) -> torch.Tensor:
        """(R,) float32 of int8, (R, groups) bfloat16 of INT4: a copy, for products with many rows."""
        rows, columns = self.shape
        scale = (torch.empty(rows, -(-columns // reference.GROUP), dtype=torch.bfloat16, device=CPU)
                 if self.precision == "int4" else torch.empty(rows, dtype=torch.float32, device=CPU))
        self._packed.copy_scale(scale.data_ptr())
        return scale

    dtype, device = torch.float32, CPU
    """Of the activations that it multiplies, which is what code asks a layer's weight for."""

    @property
    def num_bytes(self) -> int:
        """Bytes that one matvec must read: values and bits, of integers scales and row sums. An INT4 value counts as
        half a byte: what a layout wastes is left out."""
        return self._packed.num_bytes

    def matvec(self, x: torch.Tensor) -> torch.Tensor:
        """`x` (..., C) float32 -> (..., R) float32; meant for up to 8 vectors. Each gives the same bits alone.

        An x that is not finite makes every row Inf or NaN, as in a dense product, where 0 * Inf counts as well.
        """
        if (not isinstance(x, torch.Tensor) or not x.ndim or x.shape[-1] != self.shape[1] or x.dtype != torch.float32
                or x.device != CPU or x.layout != torch.strided):
            raise ValueError(f"x is {describe(x)}; it needs vectors of {self.shape[1]} float32 numbers on the cpu")
        # A small product takes less time than the way through torch's dispatcher.
        return OPS.matvec(self._number, x, self.shape[0]) if torch.compiler.is_compiling() else self._matvec(x)

    def product(self, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
        """A call that computes y (B, R) from what x (B, C) holds by then, each row as matvec does; both float32 and
        contiguous. It takes the number of threads of now."""
        call = functools.partial(self._packed.matvec, x.data_ptr(), y.data_ptr(), len(x), torch.get_num_threads())

        def multiply() -> None:
            if not call():
                y.copy_(self._matvec(x))

        return multiply

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """`x` (..., C) float32 -> (..., R): matvec of each row up to rounding, by one product of them all.

        That skips zeros where the weight's density is at most `break_even`. Otherwise the weight is expanded: on the
        backend amx tile by tile (bf16, int8, int4), elsewhere as a whole for torch. All but torch add up each row in
        the same order, whatever rows it comes with.
        """
        if (not isinstance(x, torch.Tensor) or not x.ndim or x.shape[-1] != self.shape[1] or x.dtype != torch.float32
                or x.device.type not in ("cpu", "meta") or x.layout != torch.strided):
            raise ValueError(f"x is {describe(x)}; it needs rows of {self.shape[1]} float32 numbers on the cpu")
        return OPS.matmul(self._number, x, self.shape[0])

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """`indices` (...,) int64 -> (..., C) float32: the lookup of an FP32 or BF16 embedding. Raises IndexError for a
        row that there is not."""
        check_tensor("indices", indices, *indices.shape, device=CPU, dtypes=(torch.int64,))
        if self._stored == torch.int8:
            raise ValueError(f"an {self.precision} weight gives no rows; an embedding is fp32 or bf16")
        return OPS.rows(self._number, indices, self.shape[1])

    def to_dense(self) -> torch.Tensor:
        """(R, C) float32, integers times their scale: for products with many rows at once."""
        dense = self._expanded()
        return dense * self._scale()[:, None] if self.precision == "int8" else dense

    def _expanded(self) -> torch.Tensor:
        """(R, C) float32, int8 values without their scale, INT4 with it."""
        stored = torch.empty(self.shape, dtype=self._stored, device=CPU)
        self._packed.expand(stored.data_ptr(), torch.get_num_threads())
        dense = stored.float()
        if self.precision == "int4":
            scale = self._scale()
            # In place: `scale_of_columns` would take as much memory as the weight does here.
            num_whole = self.shape[1] // reference.GROUP
            groups, rest = dense.tensor_split([num_whole * reference.GROUP], 1)
            groups.unflatten(1, (num_whole, reference.GROUP)).mul_(scale[:, :num_whole, None])
            rest.mul_(scale[:, num_whole:])
        return dense

    def _rows(self, indices: torch.Tensor) -> torch.Tensor:
        indices = consecutive(indices)
        out = torch.empty(*indices.shape, self.shape[1], dtype=torch.float32, device=CPU)
        self._packed.gather(indices.data_ptr(), indices.numel(), out.data_ptr())
        return out

    def _matvec(self, x: torch.Tensor) -> torch.Tensor:
        x = consecutive(x)
        y = x.new_empty(*x.shape[:-1], self.shape[0])
        if not y.numel() or self._packed.matvec(x.data_ptr(), y.data_ptr(), y.numel() // self.shape[0],
                                                torch.get_num_threads()):
            return y
        if x.ndim == 1:
            return self.to_dense() @ x
        return torch.stack([self._matvec(vector) for vector in x.view(-1, self.shape[1])]).view(y.shape)

    def _matmul(self, x: torch.Tensor) -> torch.Tensor:
        if not x.numel():
            return x.new_zeros(*x.shape[:-1], self.shape[0])
        is_sparse = self.density <= break_even(x.numel() // self.shape[1], self.precision)
        return self._skipping(x) if is_sparse else self._expanding(x)

    def _expanding(self, x: torch.Tensor) -> torch.Tensor:
        """`x` (..., C) -> (..., R): the weight is expanded a part at a time where the backend multiplies tiles, or as a
        whole for torch."""
        rows = consecutive(x)
        y = rows.new_empty(*x.shape[:-1], self.shape[0])
        if self._packed.multiply_tiles(rows.data_ptr(), x.numel() // self.shape[1], y.data_ptr(),
                                       torch.get_num_threads()):
            return y
        return self._scaled(x, lambda codes: functional.linear(codes, self._expanded()))

    def _skipping(self, x: torch.Tensor) -> torch.Tensor:
        """The same without the zeros."""
        return self._scaled(x, self._multiply_kept)

    def _scaled(self, x: torch.Tensor, multiply: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The product of the codes of `x` with integers, times their scales, or of `x` itself."""
        if self._stored != torch.int8:
            return multiply(x)
        codes, step = reference.quantise(x)
        return multiply(codes) * (step * self._scale() if self.precision == "int8" else step)

    def _multiply_kept(self, x: torch.Tensor) -> torch.Tensor:
        rows = consecutive(x).view(-1, self.shape[1])
        y = rows.new_empty(len(rows), self.shape[0])
        self._packed.matmul(rows.data_ptr(), len(rows), y.data_ptr(), torch.get_num_threads())
        # A row that is not finite has no finite sum. Of such a row 0 * Inf counts as well.
        finite = rows.sum(1).isfinite()
        if not finite.all():
            y[~finite] = functional.linear(rows[~finite], self._expanded())
        return y.view(*x.shape[:-1], self.shape[0])


def check_weight(values: torch.Tensor, bitmask: torch.Tensor, num_columns: int, scale: torch.Tensor | None,
                 floats: tuple[torch.dtype, ...],
                 device: torch.device | None = None) -> tuple[torch.Tensor | None, bool]:
    """What a weight (R, C) for products is made from: `values` (nnz,) of `floats`, int8 with `scale` (R,) floating, or
    INT4, as PackedMatrix has it; on one device, any where none is given. Returns the scale, consecutive and of int8
    float32, and whether the weight is INT4. Raises ValueError for what does not fit."""
    check_tensor("values", values, None, device=device, dtypes=(*floats, torch.int8))
    check_bits(bitmask, num_columns, device=values.device)
    if (values.dtype == torch.int8) != (scale is not None):
        raise ValueError(f"values are {values.dtype} and scale is {'missing' if scale is None else 'given'}; "
                         "int8 values have a scale per row or per group, others have none")
    if scale is None:
        return None, False
    if not isinstance(scale, torch.Tensor) or scale.ndim != 2:
        check_tensor("scale", scale, len(bitmask), device=values.device, dtypes=FLOATS)
        return consecutive(scale.float()), False
    check_tensor("scale", scale, len(bitmask), -(-num_columns // reference.GROUP), device=values.device,
                 dtypes=(torch.bfloat16,))
    if values.numel() and not -8 <= values.min() <= values.max() <= 7:
        raise ValueError(f"values are {int(values.min())} to {int(values.max())}; with a scale per group they "
                         "are codes of four bits, -8 to 7")
    return consecutive(scale), True


def break_even(num_rows: int, precision: str) -> float:
    """The density up to which a product of a weight of this `precision` (fp32, bf16, int8, int4) with `num_rows` rows
    is faster when it skips zeros, from 0 to 1.

    It is measured when it is first asked for, in some hundredths of a second, for each precision, power of two of rows
    (at most 128), backend and number of threads.
    """
    check_count("num_rows", num_rows, 1)
    known = (*_PRECISIONS.values(), "int4")
    if precision not in known:
        raise ValueError(f"precision is {precision!r}; it must be one of {', '.join(known)}")
    return _break_even(min(128, 1 << num_rows.bit_length() - 1), precision, backend(), torch.get_num_threads())


@functools.cache
def _break_even(num_rows: int, precision: str, backend: str, num_threads: int) -> float:
    generator, size, sparse = torch.Generator(CPU).manual_seed(0), 1024, 0.25
    x = torch.randn(num_rows, size, generator=generator, dtype=torch.float32, device=CPU)
    dtype = next((dtype for dtype, name in _PRECISIONS.items() if name == precision), torch.int8)
    scale = {"int8": x.new_ones(size),
             "int4": x.new_ones(size, size // reference.GROUP, dtype=torch.bfloat16)}.get(precision)
    gaps = []  # the time of skipping zeros less that of expanding, taken to be linear in the density
    for density in (sparse, 1.0):
        keep = torch.rand(size, size, generator=generator, device=CPU) < density
        packed = PackedMatrix(x.new_ones(int(keep.sum()), dtype=dtype), reference.pack(keep), size, scale)
        gaps.append(_fastest(packed._skipping, x) - _fastest(packed._expanding, x))
    slope = (gaps[1] - gaps[0]) / (1 - sparse)
    return min(1.0, max(0.0, sparse - gaps[0] / slope)) if slope > 0 else float(gaps[0] < 0)


def _fastest(product: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, repeats: int = 4) -> float:
    """Seconds, the least of some calls after one that is not counted."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        product(x)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


define_operator("matvec(SymInt packed, Tensor x, SymInt num_rows) -> Tensor",
                lambda packed, x, num_rows: _matrices[packed]._matvec(x),
                lambda packed, x, num_rows: x.new_empty(*x.shape[:-1], num_rows))
define_operator("matmul(SymInt packed, Tensor x, SymInt num_rows) -> Tensor",
                lambda packed, x, num_rows: _matrices[packed]._matmul(x),
                lambda packed, x, num_rows: x.new_empty(*x.shape[:-1], num_rows))
define_operator("rows(SymInt packed, Tensor indices, SymInt num_columns) -> Tensor",
                lambda packed, indices, num_columns: _matrices[packed]._rows(indices),
                lambda packed, indices, num_columns: indices.new_empty(*indices.shape, num_columns,
                                                                       dtype=torch.float32))
