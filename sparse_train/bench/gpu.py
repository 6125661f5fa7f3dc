"""Speed of a sparse model on an accelerator, in BF16, beside dense torch.

    expand   weights are expanded and then multiplied, as a model is decoded there
    sparse   the product of triton_matrix.py, for linears; no model runs with it yet
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from sparse_train.bench.decode import decode_rows
from sparse_train.bench.layers import rows_of
from sparse_train.bench.timing import interleave
from sparse_train.compat.transformers import to_device
from sparse_train.extras import require
from sparse_train.inference import Runtime
from sparse_train.models import load_model, load_processor
from sparse_train.sparse import BitmaskTensor, SparseLinear
from sparse_train.tasks import Example

_DTYPE = torch.bfloat16


def device_bandwidth(device: torch.device, num_bytes: int = 1 << 30, repeats: int = 7) -> float:
    """Bytes per second of a streaming read (a sum), the median of `repeats`."""
    source = torch.zeros(num_bytes // 4, device=device)
    timing = interleave({"read": lambda: float(source.sum())}, repeats)["read"]
    return num_bytes / timing.median


@torch.inference_mode()
def device_layer_rows(model: str, weights: Sequence[BitmaskTensor], repeats: int, bandwidth: float,
                      device: torch.device, progress: Callable[[int, int], None] | None = None) -> list[dict[str, Any]]:
    """As layer_rows, for torch's dense product, for expanding the weight before it, and for the sparse product."""
    require("cuda")
    from sparse_train.kernels.triton_matrix import DeviceMatrix

    inputs = [torch.randn(1, weight.shape[1], dtype=_DTYPE, device=device) for weight in weights]
    products: dict[tuple[str, str], list[Callable[[torch.Tensor], torch.Tensor]]] = {}
    num_bytes: dict[tuple[str, str], int] = {}
    for weight in weights:
        dense, layer = weight.to_dense().to(device, _DTYPE), SparseLinear(weight).to(_DTYPE).to(device)
        runs = DeviceMatrix(layer.values, layer.bitmask, weight.shape[1])
        for engine, product, size in (
                ("torch", functools.partial(functional.linear, weight=dense), dense.nbytes),
                ("expand", layer, layer.values.nbytes + layer.bitmask.nbytes),
                ("sparse", runs.matvec, runs.num_bytes)):
            products.setdefault((engine, "bf16"), []).append(product)
            num_bytes[engine, "bf16"] = num_bytes.get((engine, "bf16"), 0) + size

    def one_pass(key: tuple[str, str]) -> None:
        for product, x in zip(products[key], inputs, strict=True):
            y = product(x)
        float(y[0, 0])  # waits for the device

    timings = interleave({key: functools.partial(one_pass, key) for key in products}, repeats, progress)
    return rows_of(model, weights, timings, num_bytes, bandwidth)


def device_decode_rows(name: str, dense: Path | str, sparse: Path | str, sparsity: float, example: Example,
                       new_tokens: int, repeats: int, bandwidth: float, device: torch.device,
                       progress: Callable[[int, int], None] | None = None) -> list[dict[str, Any]]:
    """As decode_rows, for the model folders `dense` and `sparse`."""
    runtimes = {(name, engine, "bf16", zeros): Runtime(to_device(load_model(path, _DTYPE).eval(), device),
                                                       load_processor(path), "bf16")
                for engine, zeros, path in (("torch", 0.0, dense), ("expand", sparsity, sparse))}
    return decode_rows(runtimes, example, new_tokens, repeats, bandwidth, progress)
