"""Expanding and compacting a weight, compared with copying it: all move bytes only, so a copy's bandwidth bounds them.
"""

from collections.abc import Sequence
from typing import Any

import torch

from sparse_train import kernels
from sparse_train.bench.timing import interleave

_SHAPE = (4096, 4096)


def move_rows(sparsities: Sequence[float], repeats: int) -> list[dict[str, Any]]:
    """Rows with kernel, dtype, backend, sparsity, milliseconds (median, low, high), bytes read and written, and
    fraction_of_copy: bytes per second divided by those of a copy in the same round."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for sparsity in sparsities:
            for backend in kernels.backends():
                with kernels.use_backend(backend):
                    rows += _rows(dtype, sparsity, backend, repeats)
    return rows


def _rows(dtype: torch.dtype, sparsity: float, backend: str, repeats: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(_SHAPE, generator=generator) >= sparsity
    dense = torch.randn(_SHAPE, generator=generator).to(dtype)
    bits, values, copy, compacted = kernels.pack(keep), dense[keep], torch.empty_like(dense), dense[keep]
    expanded = torch.empty_like(dense)
    timings = interleave({
        "copy": lambda: copy.copy_(dense),
        "expand": lambda: kernels.expand(values, bits, _SHAPE[1], out=expanded),
        "compact": lambda: kernels.compact(dense, bits, out=compacted),
    }, repeats)
    num_bytes = dense.nbytes + values.nbytes + bits.nbytes
    return [{
        "kernel": kernel, "dtype": str(dtype).removeprefix("torch."), "backend": backend, "sparsity": sparsity,
        "milliseconds": 1e3 * timings[kernel].median, "low": 1e3 * timings[kernel].low,
        "high": 1e3 * timings[kernel].high, "bytes": num_bytes,
        "fraction_of_copy": num_bytes / (2 * dense.nbytes) * timings["copy"].over(timings[kernel]).median,
    } for kernel in ("expand", "compact")]
