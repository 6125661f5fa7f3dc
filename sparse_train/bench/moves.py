"""Expanding and compacting a weight, compared with copying it: all move bytes only, so a copy's bandwidth bounds them.

On a GPU each candidate is a CUDA graph that moves several weights in turn, more than its caches hold.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sparse_train import kernels
from sparse_train.bench.timing import graphed, interleave

_SHAPE = (4096, 4096)
_GPU_BYTES = 1 << 31
"""Of the dense weights of a graph."""


def move_rows(sparsities: Sequence[float], repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """Rows with kernel, dtype, backend, sparsity, milliseconds (median, low, high), bytes read and written, and
    fraction_of_copy: bytes per second divided by those of a copy in the same round."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for sparsity in sparsities:
            for backend in kernels.backends() if device.type == "cpu" else ("triton",):
                with kernels.use_backend(backend) if device.type == "cpu" else contextlib.nullcontext():
                    rows += _rows(dtype, sparsity, backend, repeats, device)
    return rows


def _rows(dtype: torch.dtype, sparsity: float, backend: str, repeats: int,
          device: torch.device) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(_SHAPE, generator=generator) >= sparsity
    dense = torch.randn(_SHAPE, generator=generator).to(dtype)
    bits, values = kernels.pack(keep), dense[keep]
    num_bytes = dense.nbytes + values.nbytes + bits.nbytes
    count = 1 if device.type == "cpu" else _GPU_BYTES // dense.nbytes
    weights = [tuple(tensor.to(device, copy=True) for tensor in (dense, values, bits)) for _ in range(count)]
    targets = [(torch.empty_like(dense), torch.empty_like(values)) for dense, values, _ in weights]

    def each(move: Callable[..., object]) -> Callable[[], object]:
        return graphed(lambda: [move(*weight, *target) for weight, target in zip(weights, targets, strict=True)],
                       device)

    timings = interleave({
        "copy": each(lambda dense, values, bits, expanded, compacted: expanded.copy_(dense)),
        "expand": each(lambda dense, values, bits, expanded, compacted: kernels.expand(
            values, bits, _SHAPE[1], out=expanded)),
        "compact": each(lambda dense, values, bits, expanded, compacted: kernels.compact(dense, bits, out=compacted)),
    }, repeats)
    return [{
        "kernel": kernel, "dtype": str(dtype).removeprefix("torch."), "backend": backend, "sparsity": sparsity,
        "milliseconds": 1e3 / count * timings[kernel].median, "low": 1e3 / count * timings[kernel].low,
        "high": 1e3 / count * timings[kernel].high, "bytes": num_bytes,
        "fraction_of_copy": num_bytes / (2 * dense.nbytes) * timings["copy"].over(timings[kernel]).median,
    } for kernel in ("expand", "compact")]
