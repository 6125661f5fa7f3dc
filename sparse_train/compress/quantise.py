"""INT8 values with one scale per row, symmetric: weight = code * scale. Pruned positions have no code."""

import torch

from sparse_train import kernels
from sparse_train.sparse import BitmaskTensor


def quantise_rows(weight: BitmaskTensor) -> tuple[BitmaskTensor, torch.Tensor]:
    """(codes in -127..127 as int8 values, scale (R,) float32). A row without kept values has scale 1."""
    rows = _row_of_each_value(weight)
    values = weight.values.float()
    largest = torch.zeros(weight.shape[0]).scatter_reduce_(0, rows, values.abs(), "amax")
    scale = torch.where(largest > 0, largest / 127, 1.0)
    codes = (values / scale[rows]).round().clamp(-127, 127).to(torch.int8)
    return BitmaskTensor(codes, weight.bitmask, weight.shape), scale


def _row_of_each_value(weight: BitmaskTensor) -> torch.Tensor:
    """(nnz,) int64."""
    counts = kernels.unpack(weight.bitmask, weight.shape[1]).sum(1)
    return torch.repeat_interleave(torch.arange(weight.shape[0]), counts)
