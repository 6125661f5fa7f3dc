"""Speed of sparse models on a GPU beside dense torch in BF16, both as CUDA graphs.

The linears are products alone: a graph multiplies so many weights, one after the other, that none is left in the L2
cache when its turn comes again. Whole models are decoded as `generate` does it, dense ones by the same Decoder.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from sparse_train.bench.decode import decode_once, decode_rows, prompted
from sparse_train.bench.layers import Key, random_weights, rows_of
from sparse_train.bench.shapes import SHAPES, shape_tokenizer
from sparse_train.bench.timing import Timing, graphed, interleave
from sparse_train.compress.quantise import QUANTISERS
from sparse_train.config import ModelConfig
from sparse_train.errors import first_line
from sparse_train.inference import PackedLinear, Runtime
from sparse_train.models import build_processor, describe, family_of
from sparse_train.models.empty import from_config
from sparse_train.sparse import BitmaskTensor, replace_module
from sparse_train.tasks import Example

log = logging.getLogger(__name__)

_DTYPE = torch.bfloat16
_GRAPH_BYTES, _GRAPH_LAUNCHES = 1 << 32, 1024
"""The dense weights that a graph of products reads, and the most products in it."""

LLAMA_8B_BLOCK = ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336))
WHOLE = {"mpt-7b": SHAPES["mpt-7b-block"].model_copy(update={"n_layers": 32, "vocab_size": 50432}),
         "llama-8b": SHAPES["llama-8b-block"].model_copy(update={"n_layers": 32, "vocab_size": 128256}),
         "mpt-506m": SHAPES["mpt-506m"]}
"""Models whose random weights a GPU makes in seconds."""

Product = Callable[[torch.Tensor], torch.Tensor]


def device_bandwidth(device: torch.device, num_bytes: int = 1 << 30, repeats: int = 7) -> float:
    """Bytes per second of a streaming read (a sum), the median of `repeats`."""
    source = torch.zeros(num_bytes // 4, device=device)
    return num_bytes / interleave({"read": graphed(source.sum, device)}, repeats)["read"].median


@torch.no_grad()
def device_layer_rows(model: str, weights: Mapping[tuple[str, float], Sequence[BitmaskTensor]], repeats: int,
                      bandwidth: float, device: torch.device, progress: Callable[[int, int], None] | None = None,
                      num_rows: int = 1) -> list[dict[str, Any]]:
    """As layer_rows, for torch's dense product and for that of `weights`, by precision and sparsity, all of the same
    shapes. With several rows, cuSPARSELt's product by its default algorithm too, of the first weights that are 2:4."""
    first = next(iter(weights.values()))
    engines: dict[Key, Callable[[], list[tuple[Product, int]]]] = {
        ("torch", "bf16", 0.0): lambda: [_dense(weight, device) for weight in first]}
    for (precision, sparsity), some in weights.items():
        engines["sparse", precision, sparsity] = functools.partial(
            lambda precision, some: [_packed(weight, precision, num_rows, device) for weight in some], precision, some)
    if num_rows > 1 and _is_2_of_4(first):  # last, since the device may be unusable after it has failed
        engines["cusparselt", "bf16", 0.5] = lambda: [_semi_structured(weight, device) for weight in first]
    dense_bytes = sum(_DTYPE.itemsize * weight.shape[0] * weight.shape[1] for weight in first)
    count = 1 if device.type == "cpu" else max(1, min(_GRAPH_BYTES // dense_bytes, _GRAPH_LAUNCHES // len(first)))
    inputs = [torch.randn(num_rows, weight.shape[1], dtype=_DTYPE, device=device) for weight in first]
    passes: dict[Key, Callable[[], object]] = {}
    num_bytes: dict[Key, int] = {}
    for key, make in engines.items():
        try:
            products = [make() for _ in range(count)]
            passes[key] = graphed(functools.partial(_multiply, products, inputs), device)
        except RuntimeError as error:
            if key[0] != "cusparselt":
                raise
            log.warning("torch's semi-structured product is left out: %s", first_line(error))
        else:
            num_bytes[key] = sum(size for _, size in products[0])
    timings = interleave(passes, repeats, progress)
    return rows_of(model, {key: Timing(tuple(seconds / count for seconds in timing.rounds))
                           for key, timing in timings.items()}, num_bytes, bandwidth, num_rows)


def _multiply(copies: list[list[tuple[Product, int]]], inputs: list[torch.Tensor]) -> None:
    for products in copies:
        for (product, _), x in zip(products, inputs, strict=True):
            product(x)


def _dense(weight: BitmaskTensor, device: torch.device) -> tuple[Product, int]:
    dense = _on(device, weight).to_dense()
    return functools.partial(functional.linear, weight=dense), dense.nbytes


def _packed(weight: BitmaskTensor, precision: str, num_rows: int, device: torch.device) -> tuple[Product, int]:
    packed = _matrix(weight, precision, num_rows, device)
    return packed.matmul, packed.num_bytes


def _semi_structured(weight: BitmaskTensor, device: torch.device) -> tuple[Product, int]:
    dense = _on(device, weight).to_dense()
    packed = torch.sparse.SparseSemiStructuredTensorCUSPARSELT.from_dense(dense)
    return functools.partial(functional.linear, weight=packed), (
        dense.nbytes * 9 // 16)  # half of the values, and two bits for each of these


def _is_2_of_4(weights: Sequence[BitmaskTensor]) -> bool:
    return all(not weight.shape[1] % 4 and bool((weight.keep.view(-1, 4).sum(1) == 2).all()) for weight in weights)


def weights_2_of_4(shapes: Sequence[tuple[int, int]], device: torch.device) -> list[BitmaskTensor]:
    """Of random values the two largest of each four."""
    generator = torch.Generator(device).manual_seed(0)
    dense = [torch.randn(shape, generator=generator, device=device) / shape[1] ** 0.5 for shape in shapes]
    return [BitmaskTensor.from_dense(weight, (weight.abs().view(-1, 4).argsort(1).argsort(1) > 1).view(weight.shape))
            for weight in dense]


def _on(device: torch.device, weight: BitmaskTensor) -> BitmaskTensor:
    return BitmaskTensor(weight.values.to(device, _DTYPE), weight.bitmask.to(device), weight.shape)


def _matrix(weight: BitmaskTensor, precision: str, num_rows: int, device: torch.device) -> Any:
    from sparse_train.kernels.triton_matrix import DeviceMatrix  # Triton is an extra

    weight, scale = _on(device, weight), None
    if precision in QUANTISERS:
        with device:
            weight, scale = QUANTISERS[precision].nearest(weight)
    return DeviceMatrix(weight.values, weight.bitmask, weight.shape[1], scale, num_rows)


def device_decode_rows(loads: Iterable[Callable[[], Runtime]], name: str, example: Example, new_tokens: int,
                       repeats: int, bandwidth: float, device: torch.device, batch: int = 1,
                       progress: Callable[[int, int], None] | None = None) -> list[dict[str, Any]]:
    """As decode_rows, of the models that `loads` give, the dense one first, for `batch` answers at a time. Rows have
    `memory` too, bytes: what the model takes, and the most that decoding allocates beside it."""
    example, runtimes, memory = prompted(example), {}, []
    for load in loads:
        before = _allocated(device)
        runtime = load()
        runtimes[name, "sparse" if runtime.is_sparse else "torch", runtime.precision, runtime.sparsity] = runtime
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # what loading took
        decode_once(runtime, example, new_tokens, batch)
        memory.append(_allocated(device, at_most=True) - before)
    rows = decode_rows(runtimes, example, new_tokens, repeats, bandwidth, progress, batch=batch)
    return [row | {"memory": num_bytes} for row, num_bytes in zip(rows, memory, strict=True)]


def _allocated(device: torch.device, at_most: bool = False) -> int:
    """Bytes, now or since they were last reset."""
    if device.type == "cpu":
        return 0
    return torch.cuda.max_memory_allocated(device) if at_most else torch.cuda.memory_allocated(device)


@torch.no_grad()
def random_runtime(size: ModelConfig, variant: tuple[str, float] | None, batch: int, device: torch.device) -> Runtime:
    """A model of this size without a folder: dense in BF16, or with the linears of its blocks of a precision and
    sparsity, for batches of so many answers."""
    torch.manual_seed(0)
    with device:
        model = from_config(describe(size), _DTYPE).eval()
    precision, sparsity = variant or ("bf16", 0.0)
    linears = family_of(model).prunable_linears(model) if variant else {}
    while linears:  # a dense one is freed when it is replaced
        name, linear = linears.popitem()
        (weight,) = random_weights([(linear.out_features, linear.in_features)], sparsity, len(linears), device)
        replace_module(model, name, PackedLinear(_matrix(weight, precision, batch, device), linear.bias))
    return Runtime(model, build_processor(size, shape_tokenizer()), precision)
