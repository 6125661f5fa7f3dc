"""What a user chooses between, measured in one run: dense torch, our sparse models and other engines."""

import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparse_train import kernels
from sparse_train.bench.decode import Key, decode_rows, example_of_length
from sparse_train.bench.peers import PEERS, prepare_peers, started
from sparse_train.bench.peers.engine import Engine
from sparse_train.bench.shapes import SHAPES, build_dense, sparse_runtimes
from sparse_train.config.base import Precision
from sparse_train.cpus import available_cpus
from sparse_train.errors import UserError
from sparse_train.inference import Runtime, load
from sparse_train.models import load_model
from sparse_train.tasks import Example
from sparse_train.tasks.batch import encode_prompt

log = logging.getLogger(__name__)

_TORCH_BF16 = "torch-bf16"
_MOST_ERROR = 0.9
"""Of logits. Unrelated ones are off by 1.4; rounding to four bits has been 0.2 to 0.5."""


def compare(folders: Sequence[str], shape: str | None, sparsities: Iterable[float], peers: Sequence[str],
            threads: Iterable[int], prompt_tokens: Iterable[int], new_tokens: int, repeats: int,
            kv_caches: Sequence[Precision] = ("fp32",)) -> Iterator[list[dict[str, Any]]]:
    """The rows of decode_rows for each number of threads and prompt, each with `threads`, `prompt_tokens`, `bandwidth`
    (bytes per second), and `logit_error`: of what computes the first model, |logits - its| / |its| behind the prompt,
    both without their mean, which no token's probability depends on.

    Raises UserError for what cannot be measured.
    """
    known, threads = (_TORCH_BF16, *PEERS), list(threads)
    for name in peers:
        if name not in ("all", *known):
            raise UserError(f"--peers {name}: there is no such peer; give all, or some of {','.join(known)}")
    names = [name for name in known if name in peers or "all" in peers]
    if shape is not None and shape not in SHAPES:
        raise UserError(f"--shape {shape}: there is no such shape; give one of {', '.join(SHAPES)}")
    if max(threads) > available_cpus():
        raise UserError(f"--threads {max(threads)}: this process may use {available_cpus()} CPUs; give at most as many")
    with tempfile.TemporaryDirectory() as work:
        dense = folders[0] if shape is None else f"{work}/{shape}"
        if shape is not None:
            build_dense(shape, Path(dense))
        runtimes: dict[Key, Runtime] = {}

        def add(folder: str, loaded: Runtime) -> None:
            for kv_cache in kv_caches:
                runtime = replace(loaded, kv_cache=kv_cache)
                runtimes[_key(folder, runtime)] = runtime

        for folder in folders or [dense]:
            add(folder, load(folder))
        first = next(iter(runtimes.values()))
        if len({runtime.processor.features is None for runtime in runtimes.values()}) > 1:
            raise UserError(f"--model {' '.join(folders)}: models of speech and of text read no prompt in common; "
                            "measure them in two runs")
        if names and (first.is_sparse or first.model.config.is_encoder_decoder):
            raise UserError(f"{dense}: other engines run dense decoders; give the folder of one first, or leave out "
                            "--peers")
        models = prepare_peers([name for name in names if name in PEERS], dense, Path(work))
        if shape is not None:
            for sparse in sparse_runtimes(Path(dense), sparsities):
                add(dense, sparse)
        if _TORCH_BF16 in names:
            runtimes[dense, "torch", "bf16", 0.0] = Runtime(load_model(dense, torch.bfloat16), first.processor, "bf16")
        examples = [Example("", "", _silence)] if first.processor.features is not None else [
            example_of_length(first.processor.tokenizer, length) for length in prompt_tokens]
        capacity = max(len(encode_prompt(example, first.processor)) for example in examples) + new_tokens
        for num_threads in threads:
            torch.set_num_threads(num_threads)
            bandwidth = kernels.read_bandwidth()
            with started(models, num_threads, capacity) as engines:
                for example in examples:
                    prompt = encode_prompt(example, first.processor)
                    rows = decode_rows(runtimes, example, new_tokens, repeats, bandwidth, engines=engines)
                    errors = _logit_errors(runtimes, engines, prompt) if names else {}
                    yield [row | {"model": shape or row["model"], "threads": num_threads, "prompt_tokens": len(prompt),
                                  "bandwidth": bandwidth, "logit_error": errors.get(key)}
                           for row, key in zip(rows, (*runtimes, *engines), strict=True)]


def _key(folder: str, runtime: Runtime) -> Key:
    stored = runtime.precision if runtime.kv_cache == "fp32" else f"{runtime.precision}, {runtime.kv_cache} cache"
    return folder, "sparse" if runtime.is_sparse else "torch", stored, runtime.sparsity


def _silence(rate: int) -> np.ndarray:
    return np.zeros(1, np.float32)  # an encoder of sound reads a whole window, whatever is in it


@torch.no_grad()
def _logit_errors(runtimes: dict[Key, Runtime], engines: dict[Key, Engine], prompt: list[int]) -> dict[Key, float]:
    dense = next(iter(runtimes))[0]
    logits = {key: runtime.model(torch.tensor([prompt])).logits[0, -1].float() for key, runtime in runtimes.items()
              if key[0] == dense and not runtime.is_sparse}
    logits |= {key: engine.logits(prompt) for key, engine in engines.items() if engine.what == "decode"}
    centred = {key: found - found.mean() for key, found in logits.items()}
    expected = next(iter(centred.values()))
    errors = {key: float((found - expected).norm() / expected.norm()) for key, found in centred.items()}
    for (_, engine, precision, _), error in errors.items():
        if not error < _MOST_ERROR:
            log.warning("%s %s: its logits differ from those of dense torch by %.2f of their norm, which is more than "
                        "rounding: it does not compute this model", engine, precision, error)
    return errors
