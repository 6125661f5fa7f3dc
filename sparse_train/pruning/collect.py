"""Statistics of what the linears of a block multiply, summed over the batches of all ranks."""

import copy
import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import nn

from sparse_train import dist
from sparse_train.errors import UserError
from sparse_train.pruning.calls import Call, pre_hooks
from sparse_train.pruning.pruner import Collects, Statistics
from sparse_train.pruning.statistics import Hessian
from sparse_train.tasks import Batch

log = logging.getLogger(__name__)


class Visit(NamedTuple):
    """A block whose turn it is, and its linears that are pruned."""

    block: str
    """Its name."""
    linears: dict[str, nn.Linear]
    """By name. Their weights are on the device, and may be changed."""
    statistics: dict[str, Any]
    """The method's Statistics: of all ranks, but for Gradients; empty where it collects none."""
    run: Callable[[], Iterator[torch.Tensor]]
    """Gives the block's outputs at the real tokens (N, D) of this rank's batches, one after the other."""


def collect(method: Collects, block: nn.Module, linears: dict[str, nn.Linear], calls: Iterable[Call],
            batches: list[Batch], side: str) -> dict[str, Statistics]:
    """Statistics of what each of `linears` (by module name) multiplies while `block` runs on the batches of all ranks,
    padding left out. Collective. Raises UserError where no token reaches a linear, or one that is not finite."""
    collector = _Collector(method, linears, side)

    def run_block() -> None:
        with pre_hooks(linears.values(), collector.add):
            for number, (call, batch) in enumerate(zip(calls, batches, strict=True)):
                collector.call, collector.batch = call, batch
                collector.number = 1 + dist.rank() + number * dist.world_size()  # as calibration_batches deals them
                with suppress(_AllSeen):
                    block(*call.args, **call.kwargs)
                collector.finish_batch()

    dist.agree(run_block)
    found = _sum_over_ranks(collector.statistics)
    for name, statistics in found.items():
        if not statistics.num_tokens:
            raise UserError(f"no calibration token reached {name}, whose inputs decide; give more or shorter examples "
                            f"(prune.num_calibration, task.max_length), or {method.without_inputs}")
    return found


def warn_of_few_tokens(linears: Mapping[str, nn.Linear], statistics: Mapping[str, Statistics]) -> None:
    """Where a Hessian of `statistics` is singular for want of tokens: a line about the one that lacks most."""
    lacks = {name: linears[name].in_features / found.num_tokens for name, found in statistics.items()
             if isinstance(found, Hessian) and found.num_tokens < linears[name].in_features}
    if lacks and dist.rank() == 0:
        name = max(lacks, key=lacks.__getitem__)
        columns = linears[name].in_features
        log.warning("%s has %d columns, and %d calibration tokens make a Hessian of that rank at most, so damping "
                    "decides the rest; %d tokens would do (prune.num_calibration times %d)", name, columns,
                    statistics[name].num_tokens, columns, math.ceil(lacks[name]))


def _sum_over_ranks(mine: dict[str, Statistics]) -> dict[str, Statistics]:
    """Linears share a sum where their inputs were the same on every rank. `mine` is used up."""
    first = {id(statistics): name for name, statistics in reversed(mine.items())}
    sharing = dist.gather_objects({name: first[id(statistics)] for name, statistics in mine.items()})
    group_of = {name: tuple(names[name] for names in sharing) for name in mine}
    parts: dict[tuple[str, ...], Statistics] = {}
    for name, statistics in mine.items():
        if group_of[name] not in parts:  # what is shared here and not elsewhere is summed twice
            is_taken = any(statistics is part for part in parts.values())
            parts[group_of[name]] = copy.deepcopy(statistics) if is_taken else statistics
    num_tokens = dist.gather_objects([part.num_tokens for part in parts.values()])
    for index, part in enumerate(parts.values()):
        dist.sum_over_ranks(part.sum)
        part.num_tokens = sum(counts[index] for counts in num_tokens)
    return {name: parts[group] for name, group in group_of.items()}


class _AllSeen(Exception):
    """Ends a block's run when nothing that is left of it counts: the product of its last linear, a quarter of a block's
    arithmetic or a third, and what follows that."""


class _Collector:
    """`add` is a forward pre-hook of linears; `call` and `batch` are what the block runs on, the batch by its `number`.

    Linears share their statistics as long as they get the same inputs, as those of queries, keys and values do.
    """

    call: Call
    batch: Batch
    number: int

    def __init__(self, method: Collects, linears: dict[str, nn.Linear], side: str):
        self._method, kind = method, method.Statistics
        assert kind is not None  # or nothing would be collected
        shared = functools.cache(kind)
        self.statistics: dict[str, Statistics] = {
            name: shared(linear.in_features, linear.weight.device) for name, linear in linears.items()}
        self._names: dict[nn.Module, str] = {linear: name for name, linear in linears.items()}
        self._side = side
        self._seen: list[str] = []
        """Linears that got inputs in this batch."""
        self._seen_once: bool | None = None
        """Whether each linear got inputs once in the first batch; None: it is not over."""
        self._pending: list[str] = []
        """Linears that got the newest inputs, which no statistics have yet."""
        self._source: tuple[torch.Tensor, int] | None = None
        """These inputs as they came, and how often they had been written to."""
        self._inputs = torch.empty(0)
        """(tokens, C): the real ones of them."""

    def add(self, linear: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs, name = args[0], self._names[linear]
        is_newest = self._source is not None and self._source[0] is inputs and self._source[1] == inputs._version
        if not is_newest or name in self._pending:
            self.finish()
            self._source, self._inputs = (inputs, inputs._version), self._real(name, inputs)
        self._pending.append(name)
        self._seen.append(name)
        if self._seen_once and set(self._seen) == set(self.statistics):
            raise _AllSeen

    def finish_batch(self) -> None:
        self.finish()
        if self._seen_once is None:
            self._seen_once = sorted(self._seen) == sorted(self.statistics)
        self._seen = []

    def finish(self) -> None:
        """Add the newest inputs to the statistics of the linears that got them."""
        for statistics in {id(found): found for found in map(self.statistics.__getitem__, self._pending)}.values():
            mine = [name for name in self._pending if self.statistics[name] is statistics]
            if len(mine) < sum(other is statistics for other in self.statistics.values()):
                statistics = copy.deepcopy(statistics)  # the others get something else
                self.statistics |= dict.fromkeys(mine, statistics)
            statistics.add(self._inputs)
        self._pending, self._source = [], None

    def _real(self, name: str, inputs: torch.Tensor) -> torch.Tensor:
        # Cross-attention multiplies the encoder's states as they came in; everything else is the block's own.
        is_foreign = any(inputs.data_ptr() == other.data_ptr() for other in self.call.others())
        is_real = self.batch.attends["encoder" if is_foreign else self._side]
        if inputs[..., 0].numel() != is_real.numel():
            raise UserError(f"{name} multiplies {inputs[..., 0].numel()} positions where the batch has "
                            f"{is_real.numel()}, so padding cannot be left out; {self._method.without_inputs}")
        inputs = inputs.reshape(-1, inputs.shape[-1])[is_real.flatten()]
        if not torch.isfinite(inputs).all():
            examples = is_real.nonzero()[~torch.isfinite(inputs).all(1), 0]
            raise UserError(f"{name}: what reaches it is not finite in example {int(examples[0]) + 1} of calibration "
                            f"batch {self.number}; the dense model is damaged or overflows")
        return inputs
