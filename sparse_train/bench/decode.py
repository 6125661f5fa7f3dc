"""Tokens per second of whole models at batch 1, as `generate` decodes them, and the time to the first token."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerBase

from sparse_train.bench.timing import Timing, interleave
from sparse_train.config import EvaluateConfig
from sparse_train.inference import Decoder, PackedLinear, Runtime, can_decode
from sparse_train.inference.streaming import Clock
from sparse_train.tasks import Example, generate
from sparse_train.tasks.batch import encode_prompt

if TYPE_CHECKING:  # that package imports this module
    from sparse_train.bench.peers.engine import Engine

_PROMPT_CHARACTERS = 64
_TEXT = "Tom has 3 boxes of 4 eggs. "

Key = tuple[str, str, str, float]
"""Name of the model, engine, precision, sparsity."""


def decode_rows(runtimes: dict[Key, Runtime], example: Example, new_tokens: int, repeats: int, bandwidth: float,
                progress: Callable[[int, int], None] | None = None,
                engines: "Mapping[Key, Engine]" = MappingProxyType({}), batch: int = 1) -> list[dict[str, Any]]:
    """One row per runtime and engine; milliseconds are medians per token after the first, which has its own.

    `runtimes`: the dense one first. `new_tokens`: at least 2 are decoded. `bandwidth`: bytes per second; the byte bound
    counts every weight once per token, an embedding only as the head that it is tied to. `batch`: answers at a time, of
    runtimes alone; a token is then one of each. `outside_products` is the share of a token's time in which no weight is
    multiplied, None where the model has no Decoder.
    """
    example, new_tokens = prompted(example), max(2, new_tokens)
    prompt = encode_prompt(example, next(iter(runtimes.values())).processor) if engines else []
    # Of the first token, and of each later one.
    seconds: dict[Any, list[tuple[float, float]]] = {key: [] for key in (*runtimes, *engines)}

    def decode(key: Any) -> None:
        if key in engines:
            first, later = engines[key].decode(prompt, new_tokens)
        else:
            clock = decode_once(runtimes[key], example, new_tokens, batch)
            first, later = clock.first_seconds, clock.later_seconds
        seconds[key].append((first, later / (new_tokens - 1)))

    candidates: dict[Any, Callable[[], object]] = {key: functools.partial(decode, key) for key in seconds}
    candidates |= {("products", key): functools.partial(
        _products, Decoder(runtime.model, batch, new_tokens), new_tokens) for key, runtime in runtimes.items()
                   if can_decode(runtime.model, len(encode_prompt(example, runtime.processor)) + new_tokens)}
    with torch.no_grad():
        products = interleave(candidates, repeats, progress)
    rows, dense, of_batch = [], None, "decode" if batch == 1 else f"decode, batch {batch}"
    for key in seconds:
        name, engine, precision, sparsity = key
        first, later = (Timing(tuple(of)) for of in zip(*seconds[key][1:], strict=True))  # one round is not measured
        dense = dense or later.median
        num_bytes = engines[key].num_bytes if key in engines else _bytes_per_token(runtimes[key], example)
        alone = products.get(("products", key))
        rows.append({
            "model": name, "what": engines[key].what if key in engines else of_batch, "engine": engine,
            "precision": precision, "sparsity": round(sparsity, 4),
            "milliseconds": 1e3 * later.median, "low": 1e3 * later.low, "high": 1e3 * later.high, "bytes": num_bytes,
            "first_token_milliseconds": 1e3 * first.median, "tokens_per_second": batch / later.median,
            "speedup": dense / later.median,
            "outside_products": None if alone is None else 1 - alone.median / new_tokens / later.median,
            "fraction_of_byte_bound": num_bytes / bandwidth / later.median,
        })
    return rows


def prompted(example: Example) -> Example:
    """A text without a prompt is prompted with its first characters."""
    if example.prompt or example.sound is not None:
        return example
    return replace(example, prompt=example.answer[:_PROMPT_CHARACTERS])


def example_of_length(tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> Example:
    """A prompt of so many tokens."""
    tokens = tokenizer.encode(_TEXT * num_tokens, add_special_tokens=False)[:num_tokens]
    return Example(str(tokenizer.decode(tokens)), "")


def decode_once(runtime: Runtime, example: Example, new_tokens: int, batch: int = 1) -> Clock:
    clock = Clock()
    runtime.generate([example] * batch, new_tokens, until_end=False, streamer=clock)
    return clock


def _products(decoder: Decoder, num_tokens: int) -> None:
    for _ in range(num_tokens):
        decoder.steps.run_products()
    float(decoder.logits[0, 0])  # waits for a GPU


def _bytes_per_token(runtime: Runtime, example: Example) -> int:
    """Bytes of the modules that run for each token; an encoder, and the projections of its states, run only once, and
    of an embedding a token reads a row. One that is tied to the head counts as the head."""
    num_runs: dict[torch.nn.Module, int] = {}

    def count(module: torch.nn.Module, args: Any, output: Any) -> None:
        num_runs[module] = num_runs.get(module, 0) + 1

    handles = [module.register_forward_hook(count) for module in runtime.model.modules()]
    try:  # in transformers' loop, which calls the modules for each token
        generate(runtime.model, runtime.processor, [example], EvaluateConfig(max_new_tokens=2), until_end=False)
    finally:
        for handle in handles:
            handle.remove()
    modules = [module for module, runs in num_runs.items() if runs > 1]
    packed = sum(module.weight.num_bytes for module in modules if isinstance(module, PackedLinear))
    num_bytes = {id(p): p.nbytes for module in modules for p in module.parameters(recurse=False)}
    embedding, head = runtime.model.get_input_embeddings(), runtime.model.get_output_embeddings()
    if head is None or head.weight is not embedding.weight:
        num_bytes.pop(id(embedding.weight), None)
    return packed + sum(num_bytes.values())
