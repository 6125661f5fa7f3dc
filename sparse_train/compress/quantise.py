"""INT8 values with a scale per row, INT4 values with a scale per row and group: weight = code * scale. Pruned positions
have no code."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional

from sparse_train import kernels
from sparse_train.sparse import BitmaskTensor

Codes = tuple[BitmaskTensor, torch.Tensor]
"""(int8 codes of the kept weights, scale): (R,) float32 for int8, (R, ceil(C / GROUP)) bfloat16 for int4."""


def quantise_rows(weight: BitmaskTensor) -> Codes:
    """(codes in -127..127 as int8 values, scale (R,) float32). A row without kept values has scale 1."""
    rows = _part_of_each_value(weight, weight.shape[1])
    values = weight.values.float()
    largest = torch.zeros(weight.shape[0]).scatter_reduce_(0, rows, values.abs(), "amax")
    scale = torch.where(largest > 0, largest / 127, 1.0)
    codes = (values / scale[rows]).round_().clamp_(-127, 127).to(torch.int8)
    return BitmaskTensor(codes, weight.bitmask, weight.shape), scale


def quantise_groups(weight: BitmaskTensor) -> Codes:
    """(codes in -8..7 as int8 values, scale (R, ceil(C / GROUP)) bfloat16), rounded to nearest.

    The largest value of a group has the code -8, so its scale has the opposite sign: all 16 codes are used, and the
    squared error is a fifth smaller than with -7..7. Codes are those of the scale as it is stored. A group without
    values has scale 1.
    """
    groups = _part_of_each_value(weight, kernels.GROUP)
    values = weight.values.float()
    num_groups = -(-weight.shape[1] // kernels.GROUP)
    none = torch.zeros(weight.shape[0] * num_groups)
    low, high = (none.scatter_reduce(0, groups, values, reduce) for reduce in ("amin", "amax"))
    scale = (torch.where(-low > high, low, high) / -8).bfloat16()
    scale = torch.where(scale == 0, 1, scale)
    codes = (values / scale.float()[groups]).round_().clamp_(-8, 7).to(torch.int8)
    return BitmaskTensor(codes, weight.bitmask, weight.shape), scale.view(weight.shape[0], num_groups)


def _part_of_each_value(weight: BitmaskTensor, width: int) -> torch.Tensor:
    """(nnz,) int64: of the parts of `width` columns that rows are cut into, numbered row after row."""
    keep = functional.pad(weight.keep, (0, -weight.shape[1] % width))
    counts = keep.view(-1, width).sum(1)
    return torch.repeat_interleave(torch.arange(len(counts)), counts)


class Quantiser(NamedTuple):
    nearest: Callable[[BitmaskTensor], Codes]
    """Rounds to nearest."""
    lowest: int
    highest: int


QUANTISERS = {"int8": Quantiser(quantise_rows, -127, 127), "int4": Quantiser(quantise_groups, -8, 7)}
"""The precisions that have codes and scales."""
