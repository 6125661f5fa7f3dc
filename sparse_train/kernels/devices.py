"""Which kernels move a tensor: those of its device in the registry, or the reference."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from sparse_train.kernels import reference
from sparse_train.registry import KERNELS


@dataclass(frozen=True)
class DeviceKernels:
    """The kernels of one type of device. They compute what those of reference.py do, and get arguments that fit.

    A device that multiplies with the bits, without expanding them first, replaces the operator of ops.py as a whole:
    torch.library.impl("sparse_train::linear", "cuda").
    """

    dtypes: tuple[torch.dtype, ...]
    """Of the values that they move; the reference moves others."""
    expand: Callable[[torch.Tensor, torch.Tensor, int, torch.Tensor | None], torch.Tensor]
    """(values, bitmask, num_columns, out) -> dense"""
    compact: Callable[[torch.Tensor, torch.Tensor, int, torch.Tensor | None], torch.Tensor]
    """(dense, bitmask, num_values, out) -> values"""


_REFERENCE = DeviceKernels((), reference.expand, reference.compact)


def kernels_for(tensor: torch.Tensor) -> DeviceKernels:
    kernels = _kernels_of(tensor.device.type)
    return kernels if tensor.dtype in kernels.dtypes else _REFERENCE


@functools.cache
def _kernels_of(device_type: str) -> DeviceKernels:
    return KERNELS.load(device_type) if device_type in KERNELS.entries else _REFERENCE
