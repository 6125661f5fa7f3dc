"""Products of a block's linears: dense torch FP32, sparse FP32, BF16, INT8 and INT4, against the byte bound.

A pass over all shapes is timed as one, so that weights of realistic sizes are never in a cache. The bound is the bytes
of the compressed weights divided by the read bandwidth, measured in the same process. One token is multiplied by
PackedMatrix.matvec, the rows of a prompt by matmul, as PackedLinear does; prompts are far from that bound.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sparse_train.bench.timing import Timing, interleave
from sparse_train.compress import quantise_groups, quantise_rows
from sparse_train.kernels import PackedMatrix
from sparse_train.sparse import BitmaskTensor

MPT_7B_BLOCK = ((12288, 4096), (4096, 4096), (16384, 4096), (4096, 16384))
MLP_2048 = ((8192, 2048), (2048, 8192))
PROMPT_ROWS = (128, 512)


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
    return rows_of(model, weights, timings, {key: num_bytes for key, (_, num_bytes) in engines.items()}, bandwidth,
                   "linears" if num_rows == 1 else f"{num_rows} rows")


def rows_of(model: str, weights: Sequence[BitmaskTensor], timings: dict[tuple[str, str], Timing],
            num_bytes: dict[tuple[str, str], int], bandwidth: float, what: str = "linears") -> list[dict[str, Any]]:
    """Rows of a table. `timings` and `num_bytes` (read per pass) are by (engine, precision), dense torch first."""
    dense = next(iter(timings.values())).median
    sparsity = 1 - sum(w.values.numel() for w in weights) / sum(w.shape[0] * w.shape[1] for w in weights)
    return [{
        "model": model, "what": what, "engine": engine, "precision": precision,
        "sparsity": 0.0 if engine == "torch" else round(sparsity, 4), "milliseconds": 1e3 * timing.median,
        "low": 1e3 * timing.low, "high": 1e3 * timing.high, "bytes": num_bytes[engine, precision],
        "speedup": dense / timing.median,
        "fraction_of_byte_bound": num_bytes[engine, precision] / bandwidth / timing.median,
    } for (engine, precision), timing in timings.items()]


def random_weights(shapes: Sequence[tuple[int, int]], sparsity: float, seed: int = 0) -> list[BitmaskTensor]:
    """Random bits and values of `shapes` (R, C); speed does not depend on which positions are kept."""
    generator = torch.Generator().manual_seed(seed)
    return [BitmaskTensor.from_dense(torch.randn(shape, generator=generator) / shape[1] ** 0.5,
                                     torch.rand(shape, generator=generator) >= sparsity) for shape in shapes]


def _engines(weights, num_rows):
    """(engine, precision) -> (a callable per weight, the bytes that a pass reads)."""
    def torch_linear(dense):
        return lambda x: torch.nn.functional.linear(x, dense)

    def product(packed):
        return packed.matvec if num_rows == 1 else packed.matmul

    dense = [weight.to_dense() for weight in weights]
    fp32 = [PackedMatrix(w.values, w.bitmask, w.shape[1]) for w in weights]
    bf16 = [PackedMatrix(w.values.bfloat16(), w.bitmask, w.shape[1]) for w in weights]
    int8 = [PackedMatrix(codes.values, codes.bitmask, codes.shape[1], scale)
            for codes, scale in map(quantise_rows, weights)]
    int4 = [PackedMatrix(codes.values, codes.bitmask, codes.shape[1], scale)
            for codes, scale in map(quantise_groups, weights)]
    return {
        ("torch", "fp32"): ([torch_linear(w) for w in dense], sum(w.nbytes for w in dense)),
        ("sparse", "fp32"): ([product(m) for m in fp32], sum(m.num_bytes for m in fp32)),
        ("sparse", "bf16"): ([product(m) for m in bf16], sum(m.num_bytes for m in bf16)),
        ("sparse", "int8"): ([product(m) for m in int8], sum(m.num_bytes for m in int8)),
        ("sparse", "int4"): ([product(m) for m in int4], sum(m.num_bytes for m in int4)),
    }
