"""DeviceMatrix: the operand of inference on a GPU, in one of two layouts."""

import functools
from collections.abc import Callable

import torch
from torch.nn import functional

from sparse_train.kernels.arguments import check_count, consecutive, describe
from sparse_train.kernels.packed import check_weight
from sparse_train.kernels.reference import unpack
from sparse_train.kernels.triton_runs import Runs
from sparse_train.kernels.triton_tiles import Tiles

_MOST_PLACES = 2 ** 31 - 1
"""Kernels count places in int32."""


class DeviceMatrix:
    """A sparse weight (R, C) laid out for products on a GPU; inference only.

    `values` (nnz,) bfloat16, int8 with `scale` (R,) floating, or INT4: int8 codes in -8..7 with `scale`
    (R, ceil(C / GROUP)) bfloat16; `bitmask` (R, 8 * ceil(C / 64)) uint8; all on one device. `num_rows`, of x, is what
    most products will have: the layout is chosen for it, and products with any other number are as right.

    Products take and give BF16 and sum in FP32. Activations are never quantised: INT8 and INT4 save bytes here, and
    their codes are exact in BF16. Products are launches on torch's current stream that wait for nothing, with memory
    from torch alone, so a CUDA graph captures them. Raises ValueError for what does not fit.
    """

    dtype = torch.bfloat16
    """Of the activations that it multiplies, which is what code asks a layer's weight for."""

    def __init__(self, values: torch.Tensor, bitmask: torch.Tensor, num_columns: int,
                 scale: torch.Tensor | None = None, num_rows: int = 1):
        check_count("num_columns", num_columns, 1)
        scale, is_int4 = check_weight(values, bitmask, num_columns, scale, (torch.bfloat16,))
        num_kept = int(unpack(bitmask, num_columns).sum())
        if num_kept != len(values):
            raise ValueError(f"the bits keep {num_kept} positions, but there are {len(values)} values; both must come "
                             "from one weight")
        self.precision = "bf16" if scale is None else "int4" if is_int4 else "int8"
        self.shape, self.device = (len(bitmask), num_columns), values.device
        self.density = num_kept / max(1, self.shape[0] * self.shape[1])
        # The one rule of which kernel multiplies. Runs skip zeros, and each row of x adds to their work; tiles do work
        # for each position, which the rows share; for more than `_most_rows` the weight is expanded and multiplied
        # dense. docs/benchmarks.md has the arithmetic of these numbers.
        layout, self._most_rows = (Runs, 16) if num_rows * self.density <= 1.4 else (Tiles, 64)
        self._layout = layout(values, bitmask, num_columns, scale, 4 if is_int4 else 8 * values.itemsize)
        num_places = self._layout.values.numel() * (2 if is_int4 else 1)
        if num_places > _MOST_PLACES:
            raise ValueError(f"a weight of shape {self.shape} takes {num_places} values, zeros that fill up included; "
                             f"a product on the GPU has at most {_MOST_PLACES}; divide its rows among several weights")

    @property
    def num_bytes(self) -> int:
        """What a product reads of the weight, unless it is expanded."""
        return sum(tensor.nbytes for tensor in self._layout.tensors if tensor is not None)

    def matmul(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """`x` (..., C) BF16 -> (..., R) BF16, which `out` is, contiguous, where it is given. Where x is not finite, a
        row may skip it that has no weight there."""
        if (not isinstance(x, torch.Tensor) or not x.ndim or x.shape[-1] != self.shape[1] or x.dtype != self.dtype
                or x.device != self.device or x.layout != torch.strided):
            raise ValueError(f"x is {describe(x)}; it needs rows of {self.shape[1]} bfloat16 numbers on {self.device}")
        if x.numel() > self._most_rows * self.shape[1]:
            y = functional.linear(x, self.to_dense())
            return y if out is None else out.copy_(y)
        y = x.new_empty(*x.shape[:-1], self.shape[0]) if out is None else out
        if y.numel():
            with torch.cuda.device_of(x):
                self._layout.multiply(consecutive(x).view(-1, self.shape[1]), y.view(-1, self.shape[0]))
        return y

    matvec = matmul

    def product(self, x: torch.Tensor, y: torch.Tensor) -> Callable[[], object]:
        """A call that computes y (B, R) from what x (B, C) holds by then, both BF16 and contiguous."""
        return functools.partial(self.matmul, x, y)

    def to_dense(self) -> torch.Tensor:
        """(R, C) BF16, to which integers times their scale are rounded."""
        with torch.cuda.device_of(self._layout.values):
            return self._layout.expand()
