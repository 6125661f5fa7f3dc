"""Tokens per second of whole models at batch 1, through Hugging Face's `generate` with its cache."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from sparse_train.bench.timing import interleave
from sparse_train.inference import PackedLinear, Runtime
from sparse_train.tasks import Example

_PROMPT_CHARACTERS = 64


def decode_rows(name: str, runtimes: dict[tuple[str, str, float], Runtime], example: Example, new_tokens: int,
                repeats: int, bandwidth: float,
                progress: Callable[[int, int], None] | None = None) -> list[dict[str, Any]]:
    """One row per runtime; milliseconds are medians per token.

    `runtimes`: (engine, precision, sparsity) -> model, the dense one first. `bandwidth`: bytes per second; the byte
    bound counts every weight once per token, tied embeddings once. A text without a prompt is prompted with its first
    characters.
    """
    if not example.prompt and example.sound is None:
        example = replace(example, prompt=example.answer[:_PROMPT_CHARACTERS])
    timings = interleave({key: functools.partial(_decode, runtime, example, new_tokens)
                          for key, runtime in runtimes.items()}, repeats, progress)
    dense = next(iter(timings.values())).median
    rows = []
    for (engine, precision, sparsity), timing in timings.items():
        num_bytes = _bytes_per_token(runtimes[engine, precision, sparsity], example)
        ms = 1e3 / new_tokens
        rows.append({
            "model": name, "what": "decode", "engine": engine, "precision": precision, "sparsity": round(sparsity, 4),
            "milliseconds": ms * timing.median, "low": ms * timing.low, "high": ms * timing.high, "bytes": num_bytes,
            "tokens_per_second": new_tokens / timing.median, "speedup": dense / timing.median,
            "fraction_of_byte_bound": num_bytes / bandwidth / (timing.median / new_tokens),
        })
    return rows


def _decode(runtime: Runtime, example: Example, new_tokens: int) -> None:
    runtime.generate([example], new_tokens, until_end=False)


def _bytes_per_token(runtime: Runtime, example: Example) -> int:
    """Bytes of the modules that run for each token; an encoder, and the projections of its states, run only once."""
    num_runs: dict[torch.nn.Module, int] = {}

    def count(module: torch.nn.Module, args: Any, output: Any) -> None:
        num_runs[module] = num_runs.get(module, 0) + 1

    handles = [module.register_forward_hook(count) for module in runtime.model.modules()]
    try:
        _decode(runtime, example, 2)
    finally:
        for handle in handles:
            handle.remove()
    modules = [module for module, runs in num_runs.items() if runs > 1]
    packed = sum(module.weight.num_bytes for module in modules if isinstance(module, PackedLinear))
    num_bytes = {id(p): p.nbytes for module in modules for p in module.parameters(recurse=False)}
    return packed + sum(num_bytes.values())
