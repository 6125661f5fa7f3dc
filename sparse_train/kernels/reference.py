"""The spec of the kernels in plain torch: any device, any dtype. The native code is tested against it.

A sparse weight of shape (R, C): `values` (nnz,) in row-major order and `bitmask` (R, 8 * ceil(C / 64)) uint8, where bit
k % 8 of byte k // 8 of a row says that column k is kept; padding bits are 0. INT4 values are int8 codes in -8..7 with a
scale (R, ceil(C / GROUP)) bfloat16: half of float32's bytes and all of its range, so that no scale vanishes.
"""

import torch
from torch.nn import functional

from sparse_train.kernels.arguments import check_bits, check_target, check_tensor

GROUP = 128
"""Columns of a row that share a scale where values have four bits."""


def pack(keep: torch.Tensor) -> torch.Tensor:
    """`keep` (R, C) bool, True where a weight survives -> bitmask (R, 8 * ceil(C / 64)) uint8."""
    check_tensor("keep", keep, None, None, dtypes=(torch.bool,))
    padded = functional.pad(keep.to(torch.uint8), (0, -keep.shape[1] % 64))
    place = torch.arange(8, dtype=torch.uint8, device=keep.device)
    return (padded.unflatten(1, (-1, 8)) << place).sum(-1, dtype=torch.uint8)


def unpack(bitmask: torch.Tensor, num_columns: int) -> torch.Tensor:
    """Bitmask -> keep (R, num_columns) bool."""
    check_bits(bitmask, num_columns, device=None)
    place = torch.arange(8, dtype=torch.uint8, device=bitmask.device)
    return ((bitmask.unsqueeze(-1) >> place) & 1).bool().flatten(1)[:, :num_columns]


def expand(values: torch.Tensor, bitmask: torch.Tensor, num_columns: int,
           out: torch.Tensor | None = None) -> torch.Tensor:
    """(values, bitmask) -> dense (R, num_columns) of the values' dtype, +0 where pruned."""
    dense = check_target(out, (len(bitmask), num_columns), values).zero_()
    return dense.masked_scatter_(unpack(bitmask, num_columns), values)


def compact(dense: torch.Tensor, bitmask: torch.Tensor, num_values: int | None = None,
            out: torch.Tensor | None = None) -> torch.Tensor:
    """Dense (R, C) -> its entries at the kept positions, row-major (nnz,). Raises ValueError where nnz is known to be
    `num_values` and is not."""
    values = dense[unpack(bitmask, dense.shape[1])]
    if num_values not in (None, len(values)):
        raise ValueError(f"the bits keep {len(values)} positions, but there are {num_values} values; both must come "
                         "from one weight")
    return values if out is None else check_target(out, values.shape, dense).copy_(values)


def scale_of_columns(scale: torch.Tensor, num_columns: int) -> torch.Tensor:
    """Scale of groups (R, ceil(num_columns / GROUP)) -> (R, num_columns) float32."""
    return scale.float().repeat_interleave(GROUP, 1)[:, :num_columns]


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (..., C) float32 -> (codes (..., C), step (..., 1)), both float32: x is about codes * step.

    A row's codes are whole numbers, 255 apart from least to greatest, 0 among them. They are what the products of INT8
    and INT4 weights make of activations. A row that is not finite gives no numbers at all.
    """
    x = x.double()
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    step = torch.where(high == low, 1.0, (high - low) / 255)
    zero = (-low * (1 / step)).round()
    codes = (x * (1 / step)).round_().add_(zero).clamp_(0, 255).sub_(zero)
    return codes.float(), step.float()
