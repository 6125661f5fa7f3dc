"""Speed of a sparse model on an accelerator, where its weights are expanded and then multiplied, in BF16.

No kernel there multiplies with the bits yet; these rows are the baseline for one, beside dense torch.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_train.bench.decode import decode_rows
from sparse_train.bench.layers import rows_of
from sparse_train.bench.timing import interleave
from sparse_train.compat.transformers import to_device
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
    """As layer_rows, for torch's dense product and for expanding the weight before it."""
    inputs = [torch.randn(1, weight.shape[1], dtype=_DTYPE, device=device) for weight in weights]
    engines: dict[tuple[str, str], list[nn.Module]] = {("torch", "bf16"): [], ("expand", "bf16"): []}
    for weight in weights:
        dense = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        dense.weight = nn.Parameter(weight.to_dense().to(device, _DTYPE))
        engines["torch", "bf16"].append(dense)
        engines["expand", "bf16"].append(SparseLinear(weight).to(_DTYPE).to(device))

    def one_pass(modules: list[nn.Module]) -> None:
        for module, x in zip(modules, inputs, strict=True):
            y = module(x)
        float(y[0, 0])  # waits for the device

    timings = interleave({key: functools.partial(one_pass, modules) for key, modules in engines.items()}, repeats,
                         progress)
    num_bytes = {key: sum(p.nbytes for module in modules for p in module.parameters())
                 for key, modules in engines.items()}
    return rows_of(model, weights, timings, num_bytes, bandwidth)


def device_decode_rows(name: str, dense: Path | str, sparse: Path | str, sparsity: float, example: Example,
                       new_tokens: int, repeats: int, bandwidth: float, device: torch.device,
                       progress: Callable[[int, int], None] | None = None) -> list[dict[str, Any]]:
    """As decode_rows, for the model folders `dense` and `sparse`."""
    runtimes = {(name, engine, "bf16", zeros): Runtime(to_device(load_model(path, _DTYPE).eval(), device),
                                                       load_processor(path), "bf16")
                for engine, zeros, path in (("torch", 0.0, dense), ("expand", sparsity, sparse))}
    return decode_rows(runtimes, example, new_tokens, repeats, bandwidth, progress)
