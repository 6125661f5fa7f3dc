"""Pruning one block of an MPT: what its phases take, by method, and what a model of such blocks would take.

`prune` runs as it does in a run, with clocks around the functions that it calls: what a phase takes does not include
the phases inside it. Weights and tokens are random, which changes no shape.
"""

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any
from unittest.mock import patch

import torch

from sparse_train import dist
from sparse_train.compat.transformers import to_device
from sparse_train.config import ModelConfig, PruneConfig
from sparse_train.errors import UserError
from sparse_train.models import describe, family_of
from sparse_train.models.empty import from_config
from sparse_train.pruning import Layer, Pruner, build_pruner, prune
from sparse_train.pruning.rows import divide
from sparse_train.pruning.statistics import Gradients
from sparse_train.registry import PRUNERS
from sparse_train.tasks import Batch

_SEQUENCE = 2048  # tokens of an example; shorter if there are fewer in all, and only whole ones count
_DECOMPOSITIONS = ((torch.linalg, "cholesky"), (torch.linalg, "cholesky_ex"), (torch.linalg, "eigh"),
                   (torch, "cholesky_inverse"))
PHASES = ("forward", "statistics", "decompositions", "updates", "other")

MODELS = {"MPT-7B": (4096, 32), "MPT-30B": (7168, 48)}
"""Width and number of blocks."""
MODEL_TOKENS = 128 * _SEQUENCE
ASSUMPTIONS = (
    f"{MODEL_TOKENS:,} calibration tokens, shared over the devices; two passes through each block, the "
    "first up to the inputs of its last linear",
    "forward passes and statistics grow with the square of the width",
    "so do the updates of methods that decompose nothing; otherwise both grow with its cube",
    "devices share a block's linears, the largest first, and wait for each other at each block; with admm and alps the "
    "rows of a large one are divided, and each device repeats its decompositions",
    "every device is like this one; reading, writing and communication take no time")


@dataclass(frozen=True)
class LinearCost:
    """What pruning a linear takes, in seconds."""

    shape: tuple[int, int]
    """(R, C)"""
    decompositions: float
    updates: float


@dataclass(frozen=True)
class BlockCost:
    """What pruning a block takes."""

    method: str
    width: int
    num_tokens: int
    seconds: dict[str, float]
    """By phase; forward is both passes: one to collect statistics, one for what the next block reads."""
    linears: dict[str, LinearCost]
    """By name."""
    divides_rows: bool
    """As Pruner.divides_rows."""

    def of_model(self, width: int, num_blocks: int, num_devices: int) -> float:
        """Seconds for a model, as ASSUMPTIONS say."""
        passes = (self.seconds["forward"] + self.seconds["statistics"]) * MODEL_TOKENS / self.num_tokens
        loads, scale, power = [0.0] * num_devices, width / self.width, 3 if self.seconds["decompositions"] else 2
        shapes = {name: (int(rows * scale), int(columns * scale))
                  for name, (rows, columns) in ((name, cost.shape) for name, cost in self.linears.items())}
        for name, start, stop, device in divide(shapes, num_devices, self.divides_rows):
            cost = self.linears[name]
            loads[device] += cost.decompositions + cost.updates * (stop - start) / shapes[name][0]
        return num_blocks * (scale**2 * (passes / num_devices + self.seconds["other"]) + scale**power * max(loads))


def prune_rows(methods: Sequence[str] | None, width: int, num_tokens: int, sparsity: float) -> list[dict[str, Any]]:
    """One row per method: a BlockCost, and under `models` [model, devices, seconds] of each of MODELS.

    None: all methods but those that read gradients, which come through a whole model. Raises UserError for one of them.
    """
    by_gradients = [name for name in PRUNERS.entries if PRUNERS.load(name).Statistics is Gradients]
    methods = methods or [name for name in PRUNERS.entries if name not in by_gradients]
    for method in methods:
        if method in by_gradients:
            raise UserError(f"{method} prunes by gradients of a whole model's loss, and this measures a block alone; "
                            "choose another method")
    rows = []
    for method in methods:
        _measure(method, 128, 512, sparsity)  # what libraries do at their first call is no phase
        cost = _measure(method, width, num_tokens, sparsity)
        rows.append(asdict(cost) | {"models": [
            [name, num_devices, cost.of_model(*size, num_devices)]
            for name, size in MODELS.items() for num_devices in (1, 8, 64)]})
    return rows


def _measure(method_name: str, width: int, num_tokens: int, sparsity: float) -> BlockCost:
    torch.manual_seed(0)
    length = min(num_tokens, _SEQUENCE)
    heads = width // (64 if width % 128 else 128)
    model = to_device(from_config(describe(ModelConfig(
        family="mpt", d_model=width, n_layers=1, n_heads=heads, max_seq_len=length, vocab_size=512))), dist.device())
    (block,) = family_of(model).blocks(model).values()
    spec = PruneConfig(method=method_name, sparsity=sparsity)
    batches = [_batch(length) for _ in range(num_tokens // length)]
    clock, linears, method = _Clock(), {}, build_pruner(spec)
    method_class = type(method)
    update = clock.of("updates", method_class.prune)

    def prune_linear(pruner: Pruner, layer: Layer, statistics: Any) -> tuple[torch.Tensor, torch.Tensor]:
        before = dict(clock.seconds)
        pruned = update(pruner, layer, statistics)
        linears[layer.name.rpartition(".")[2]] = LinearCost((layer.weight.shape[0], layer.weight.shape[1]), *(
            clock.seconds[phase] - before.get(phase, 0.0) for phase in ("decompositions", "updates")))
        return pruned

    with ExitStack() as patches:
        patches.enter_context(patch.object(method_class, "prune", prune_linear))
        watched: list[tuple[Any, str, str]] = [(owner, name, "decompositions") for owner, name in _DECOMPOSITIONS]
        watched += [(type(block), "forward", "forward")]
        watched += [(method_class.Statistics, "add", "statistics")] if method_class.Statistics else []
        for owner, name, phase in watched:
            patches.enter_context(patch.object(owner, name, clock.of(phase, getattr(owner, name))))
        clock.of("other", prune)(model, batches, spec)
        if clock.seconds["forward"]:  # outputs of a model's last block, its only one, are not computed
            model.eval()
            for batch in batches:
                with torch.no_grad():
                    model(**batch.inputs(), use_cache=False)
    seconds = {phase: clock.seconds[phase] for phase in PHASES}
    return BlockCost(method_name, width, length * len(batches), seconds, linears, method.divides_rows)


def _batch(length: int) -> Batch:
    ids = torch.randint(512, (1, length))
    return Batch(ids, torch.ones_like(ids, dtype=torch.bool), ids).to(dist.device())


class _Clock:
    """Seconds in functions, without those of other functions of the same clock that they call."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._inside = 0.0

    def of(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            before, self._inside = self._inside, 0.0
            start = _now()
            try:
                return function(*args, **kwargs)
            finally:
                spent = _now() - start
                self.seconds[phase] += spent - self._inside
                self._inside = before + spent
        return timed


def _now() -> float:
    """Once the device has done what it was told."""
    if dist.device().type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()
