"""The native code on tensors in CPU memory: moving weights, choosing instructions, measuring the memory."""

import contextlib
import os
from collections.abc import Iterator

import torch

from sparse_train.errors import UserError
from sparse_train.kernels.arguments import check_count, check_target, consecutive
from sparse_train.kernels.devices import DeviceKernels

try:
    from sparse_train.kernels import _native
except ImportError as error:
    raise ImportError("the native kernels are not built; run `make setup`, or pip install --no-build-isolation -e . "
                      f"in the repository ({error})") from error

PORTABLE_NOTE = ("portable kernels: without AVX2, AVX-512 or NEON sparse products are computed one value after the "
                 "other; dense torch may be faster")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_MOST_THREADS = 4096


def backends() -> tuple[str, ...]:
    """The tiers of csrc/tiers.h that this CPU supports, fastest first."""
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
    """As reference.expand. Raises ValueError when bits and values do not belong together."""
    dense = check_target(out, (len(bitmask), num_columns), values)
    values, bitmask = consecutive(values), consecutive(bitmask)
    _native.expand(values.data_ptr(), bitmask.data_ptr(), dense.data_ptr(), dense.shape[0], dense.shape[1],
                   values.numel(), values.element_size(), torch.get_num_threads())
    return dense


def compact(dense: torch.Tensor, bitmask: torch.Tensor, num_values: int,
            out: torch.Tensor | None = None) -> torch.Tensor:
    """As reference.compact. Raises ValueError when the bits keep another number than `num_values`."""
    values = check_target(out, (num_values,), dense)
    dense, bitmask = consecutive(dense), consecutive(bitmask)
    _native.compact(dense.data_ptr(), bitmask.data_ptr(), values.data_ptr(), dense.shape[0], dense.shape[1], num_values,
                    dense.element_size(), torch.get_num_threads())
    return values


KERNELS = DeviceKernels((*FLOATS, torch.int8), expand, compact)


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
