"""Runs in a peer's environment, without this package: an engine that decodes one model, a request per line.

    argument   {"engine": NAME, "model": FILE, "threads": N, "capacity": N}
    stdin      {"prompt": [ids], "new_tokens": N}, N 0: the logits behind the prompt instead
    stdout     {} when the model is loaded; then {"tokens": [ids], "first_seconds": S, "later_seconds": S}
               or {"logits": [...]}; what the engine itself prints goes to stderr

An engine is a function of the argument that returns feed(tokens, start): the logits behind `tokens`, which are at
positions `start`, ...; 0 begins another text.
"""

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Feed = Callable[[list[int], int], np.ndarray]


def llama_cpp(spec: dict[str, Any]) -> Feed:
    import llama_cpp as api

    return _llama(api, spec, lambda context: api.llama_memory_clear(api.llama_get_memory(context), True))


def ik_llama_cpp(spec: dict[str, Any]) -> Feed:
    from ik_llama_cpp import _ctypes_api as api

    return _llama(api, spec, api.llama_kv_cache_clear)


def _llama(api: Any, spec: dict[str, Any], clear: Callable[[Any], None]) -> Feed:
    api.llama_backend_init()
    model = api.llama_model_load_from_file(spec["model"].encode(), api.llama_model_default_params())
    settings = api.llama_context_default_params()
    settings.n_ctx = settings.n_batch = spec["capacity"]
    settings.n_threads = settings.n_threads_batch = spec["threads"]
    context = api.llama_init_from_model(model, settings) if model else None
    if not context:
        raise RuntimeError(f"cannot load {spec['model']}")
    num_logits = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    batch = api.llama_batch_init(spec["capacity"], 0, 1)

    def feed(tokens: list[int], start: int) -> np.ndarray:
        if not start:
            clear(context)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, start + i, 1, 0
            batch.logits[i] = i == len(tokens) - 1
        if api.llama_decode(context, batch):
            raise RuntimeError(f"cannot decode {len(tokens)} tokens at {start}")
        logits = api.llama_get_logits_ith(context, -1)
        return np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (num_logits,))

    return feed


ENGINES: dict[str, Callable[[dict[str, Any]], Feed]] = {"llama.cpp": llama_cpp, "ik_llama.cpp": ik_llama_cpp}


def answer(feed: Feed, prompt: list[int], new_tokens: int) -> dict[str, Any]:
    """What is printed for a request."""
    start = time.perf_counter()
    logits = feed(prompt, 0)
    if not new_tokens:
        return {"logits": logits.tolist()}
    tokens = [int(logits.argmax())]
    first = time.perf_counter()
    while len(tokens) < new_tokens:
        tokens.append(int(feed(tokens[-1:], len(prompt) + len(tokens) - 1).argmax()))
    return {"tokens": tokens, "first_seconds": first - start, "later_seconds": time.perf_counter() - first}


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    spec = json.loads(sys.argv[1])
    feed = ENGINES[spec["engine"]](spec)
    print("{}", file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(answer(feed, request["prompt"], request["new_tokens"])), file=replies, flush=True)


if __name__ == "__main__":
    main()
