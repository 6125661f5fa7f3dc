"""Products of a block's linears: dense torch FP32, sparse FP32, BF16, INT8 and INT4, against the byte bound.

A pass over all shapes is timed as one, so that weights of realistic sizes are never in a cache. The bound is the bytes
of the compressed weights divided by the read bandwidth, measured in the same process. One token is multiplied by
PackedMatrix.matvec, the rows of a prompt by matmul, as PackedLinear does; prompts are far from that bound.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from sparse_train.bench.timing import Timing, interleave
from sparse_train.compress import quantise_groups, quantise_rows
from sparse_train.kernels import PackedMatrix
from sparse_train.sparse import BitmaskTensor

MPT_7B_BLOCK = ((12288, 4096), (4096, 4096), (16384, 4096), (4096, 16384))
MLP_2048 = ((8192, 2048), (2048, 8192))
PROMPT_ROWS = (128, 512)

Key = tuple[str, str, float]
"""Engine, precision, sparsity."""


def layer_rows(model: str, weights: Sequence[BitmaskTensor], repeats: int, bandwidth: float,
               progress: Callable[[int, int], None] | None = None, num_rows: int = 1) -> list[dict[str, Any]]:
    """One row per engine, for a pass over `weights` with `num_rows` rows; `bandwidth` in bytes per second.
    milliseconds are medians."""
    engines = _engines(weights, num_rows)
    inputs = [torch.randn(num_rows, weight.shape[1]) for weight in weights]

    def one_pass(operands: Sequence[Callable[[torch.Tensor], torch.Tensor]]) -> None:
        for operand, x in zip(operands, inputs, strict=True):
            operand(x)

    timings = interleave({key: functools.partial(one_pass, operands) for key, (operands, _) in engines.items()},
                         repeats, progress)
    return rows_of(model, timings, {key: num_bytes for key, (_, num_bytes) in engines.items()}, bandwidth, num_rows)


def rows_of(model: str, timings: Mapping[Key, Timing], num_bytes: Mapping[Key, int], bandwidth: float,
            num_rows: int = 1) -> list[dict[str, Any]]:
    """Rows of a table. `timings` of a pass with `num_rows` rows, and `num_bytes` that it reads; dense torch first."""
    dense = next(iter(timings.values())).median
    return [{
        "model": model, "what": "linears" if num_rows == 1 else f"{num_rows} rows", "engine": key[0],
        "precision": key[1], "sparsity": key[2], "milliseconds": 1e3 * timing.median, "low": 1e3 * timing.low,
        "high": 1e3 * timing.high, "bytes": num_bytes[key], "speedup": dense / timing.median,
        "fraction_of_byte_bound": num_bytes[key] / bandwidth / timing.median,
    } for key, timing in timings.items()]


def sparsity_of(weights: Sequence[BitmaskTensor]) -> float:
    """Of all together, as a row has it."""
    return round(1 - sum(w.values.numel() for w in weights) / sum(w.shape[0] * w.shape[1] for w in weights), 4)


def random_weights(shapes: Sequence[tuple[int, int]], sparsity: float, seed: int = 0,
                   device: torch.device | None = None) -> list[BitmaskTensor]:
    """Random bits and values of `shapes` (R, C); speed does not depend on which positions are kept."""
    generator = torch.Generator(device or "cpu").manual_seed(seed)
    return [BitmaskTensor.from_dense(torch.randn(shape, generator=generator, device=device) / shape[1] ** 0.5,
                                     torch.rand(shape, generator=generator, device=device) >= sparsity)
            for shape in shapes]


def _engines(weights, num_rows):
    """Key -> (a callable per weight, the bytes that a pass reads)."""
    def torch_linear(dense):
        return lambda x: torch.nn.functional.linear(x, dense)

    def product(packed):
        return packed.matvec if num_rows == 1 else packed.matmul

    sparsity, dense = sparsity_of(weights), [weight.to_dense() for weight in weights]
    fp32 = [PackedMatrix(w.values, w.bitmask, w.shape[1]) for w in weights]
    bf16 = [PackedMatrix(w.values.bfloat16(), w.bitmask, w.shape[1]) for w in weights]
    int8 = [PackedMatrix(codes.values, codes.bitmask, codes.shape[1], scale)
            for codes, scale in map(quantise_rows, weights)]
    int4 = [PackedMatrix(codes.values, codes.bitmask, codes.shape[1], scale)
            for codes, scale in map(quantise_groups, weights)]
    return {
        ("torch", "fp32", 0.0): ([torch_linear(w) for w in dense], sum(w.nbytes for w in dense)),
        ("sparse", "fp32", sparsity): ([product(m) for m in fp32], sum(m.num_bytes for m in fp32)),
        ("sparse", "bf16", sparsity): ([product(m) for m in bf16], sum(m.num_bytes for m in bf16)),
        ("sparse", "int8", sparsity): ([product(m) for m in int8], sum(m.num_bytes for m in int8)),
        ("sparse", "int4", sparsity): ([product(m) for m in int4], sum(m.num_bytes for m in int4)),
    }
