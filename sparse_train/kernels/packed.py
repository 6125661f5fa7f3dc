"""PackedMatrix: the operand of inference, in the memory of native code."""

import itertools
import weakref

import torch
from torch.nn import functional

from sparse_train.kernels import reference
from sparse_train.kernels.arguments import CPU, check_bits, check_tensor, consecutive, describe
from sparse_train.kernels.native import FLOATS, _native
from sparse_train.kernels.ops import OPS, define_operator

# Operators take tensors and numbers. A number is given once, so that a compiled graph never meets another matrix.
_numbers = itertools.count()
_matrices: weakref.WeakValueDictionary[int, "PackedMatrix"] = weakref.WeakValueDictionary()


class PackedMatrix:
    """A sparse weight laid out for batch-1 products on the CPU; inference only.

    `values` (nnz,) float32, bfloat16 or float16 (kept as float32), or int8 with `scale` (R,) floating; `bitmask`
    (R, 8 * ceil(C / 64)) uint8. INT8 products quantise each x to 8 bits. Raises ValueError for what does not fit.
    """

    def __init__(self, values: torch.Tensor, bitmask: torch.Tensor, num_columns: int,
                 scale: torch.Tensor | None = None):
        check_tensor("values", values, None, device=CPU, dtypes=(*FLOATS, torch.int8))
        check_bits(bitmask, num_columns)
        if (values.dtype == torch.int8) != (scale is not None):
            raise ValueError(f"values are {values.dtype} and scale is {'missing' if scale is None else 'given'}; "
                             "int8 values have a scale per row, others have none")
        if scale is not None:
            check_tensor("scale", scale, len(bitmask), device=CPU, dtypes=FLOATS)
            scale = consecutive(scale.float())
        values, bitmask = consecutive(values if scale is not None else values.float()), consecutive(bitmask)
        self.shape = (len(bitmask), num_columns)
        self._scale = scale
        self._packed = _native.Packed(values.data_ptr(), bitmask.data_ptr(), 0 if scale is None else scale.data_ptr(),
                                      *self.shape, values.numel(), scale is not None, torch.get_num_threads())
        self._number = next(_numbers)
        _matrices[self._number] = self

    dtype, device = torch.float32, CPU
    """Of the activations that it multiplies, which is what code asks a layer's weight for."""

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
        # A small product takes less time than the way through torch's dispatcher.
        return OPS.matvec(self._number, x, self.shape[0]) if torch.compiler.is_compiling() else self._matvec(x)

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        """`x` (..., C) float32 -> (..., R): matvec of each row, by one dense product, which is what many rows need."""
        return OPS.matmul(self._number, x, self.shape[0])

    def to_dense(self) -> torch.Tensor:
        """(R, C) float32, int8 values times their scale: for products with many rows at once."""
        dense = self._expanded()
        return dense if self._scale is None else dense * self._scale[:, None]

    def _expanded(self) -> torch.Tensor:
        """(R, C) as the values are stored."""
        dense = torch.empty(self.shape, dtype=torch.float32 if self._scale is None else torch.int8)
        self._packed.expand(dense.data_ptr(), torch.get_num_threads())
        return dense

    def _matvec(self, x: torch.Tensor) -> torch.Tensor:
        x = consecutive(x)
        y = torch.empty(self.shape[0])
        if self._packed.matvec(x.data_ptr(), y.data_ptr(), torch.get_num_threads()):
            return y
        return self.to_dense() @ x.flatten()

    def _matmul(self, x: torch.Tensor) -> torch.Tensor:
        if self._scale is None:
            return functional.linear(x, self.to_dense())
        codes, step = reference.quantise(x)
        return functional.linear(codes, self._expanded().float()) * (step * self._scale)


define_operator("matvec(SymInt packed, Tensor x, SymInt num_rows) -> Tensor",
                lambda packed, x, num_rows: _matrices[packed]._matvec(x),
                lambda packed, x, num_rows: x.new_empty(num_rows))
define_operator("matmul(SymInt packed, Tensor x, SymInt num_rows) -> Tensor",
                lambda packed, x, num_rows: _matrices[packed]._matmul(x),
                lambda packed, x, num_rows: x.new_empty(*x.shape[:-1], num_rows))
