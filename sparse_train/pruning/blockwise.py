"""Prune a model block by block, each block's inputs computed by the blocks already pruned.

    per stack: one forward pass of the model; hooks record what each block is called with
    per block: run it on the recorded arguments to collect the method's statistics -> prune its linears -> run it again,
               which computes the next block's hidden states

A block is called as the model itself called it; nothing of a model's inside is repeated here. The decoder's arguments
are recorded after the encoder is pruned, so its cross-attention learns from pruned states.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sparse_train.config import PruneConfig
from sparse_train.errors import UserError
from sparse_train.models import block_output, family_of
from sparse_train.pruning.allocation import InputNorms, allocate
from sparse_train.pruning.layers import choose_layers
from sparse_train.pruning.pruner import Layer, Pruner, Statistics, build_pruner
from sparse_train.sparse import BitmaskTensor
from sparse_train.tasks import Batch

Progress = Callable[[int, int, str], None]


def prune(model: PreTrainedModel, batches: Iterable[Batch], spec: PruneConfig, progress: Progress | None = None,
          earlier: Mapping[str, torch.Tensor] | None = None) -> dict[str, BitmaskTensor]:
    """The sparse weight of every linear that is pruned, by module name. The model's weights become the pruned ones.

    `batches` are on the model's device; a method without calibration does not read them. `earlier`: name -> keep (R, C)
    of a model that was pruned before; what it dropped stays dropped. Raises UserError for settings that do not fit the
    model's linears (see choose_layers), and where a method that prunes by inputs gets no token.
    """
    (level,) = spec.levels  # those of a chain are pruned one by one
    linears = family_of(model).dense_linears(model)
    specs = choose_layers({name: (linear.out_features, linear.in_features) for name, linear in linears.items()}, level)
    layers = [Layer(name, linears[name].weight, layer, (earlier or {}).get(name)) for name, layer in specs.items()]
    if level.allocation != "uniform":
        inputs = InputNorms()
        if level.allocation == "owl":
            batches = list(batches)
            prune_layers(model, inputs, layers, batches)
        layers = allocate(layers, list(family_of(model).blocks(model)), level, inputs.norms)
    return prune_layers(model, build_pruner(level), layers, batches, progress)


@torch.no_grad()
def prune_layers(model: PreTrainedModel, pruner: Pruner, layers: Sequence[Layer], batches: Iterable[Batch],
                 progress: Progress | None = None) -> dict[str, BitmaskTensor]:
    """As `prune`, with a method and layers of the caller's."""
    was_training = model.training
    model.eval()
    try:
        if pruner.Statistics is None:
            return {layer.name: _apply(layer, pruner.prune(layer, None)) for layer in layers}
        return _prune_blocks(model, pruner, {layer.name: layer for layer in layers}, list(batches), progress)
    finally:
        model.train(was_training)


def _apply(layer: Layer, pruned: tuple[torch.Tensor, torch.Tensor]) -> BitmaskTensor:
    weight, keep = pruned
    layer.weight.data.copy_(weight)
    return BitmaskTensor.from_dense(layer.weight.data, keep)


@dataclass(frozen=True)
class _Call:
    """A block's arguments; its hidden states are the first one, by position or by name."""

    args: tuple
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> torch.Tensor:
        return self.args[0] if self.args else self.kwargs["hidden_states"]

    def with_hidden(self, states: torch.Tensor | None) -> "_Call":
        if self.args:
            return _Call((states, *self.args[1:]), self.kwargs)
        return _Call((), {**self.kwargs, "hidden_states": states})

    def others(self) -> list[torch.Tensor]:
        """Tensors among the arguments other than the hidden states: masks, positions, the encoder's states."""
        return [value for value in (*self.args[1:], *(v for k, v in self.kwargs.items() if k != "hidden_states"))
                if isinstance(value, torch.Tensor)]


def _prune_blocks(model: PreTrainedModel, pruner: Pruner, layers: dict[str, Layer], batches: list[Batch],
                  progress: Progress | None) -> dict[str, BitmaskTensor]:
    weights: dict[str, BitmaskTensor] = {}
    family = family_of(model)
    all_linears = {name: linear for name, linear in family.dense_linears(model).items() if name in layers}
    blocks, num_done = family.blocks(model), 0
    for stack in family.stacks:
        stack_blocks = {name: block for name, block in blocks.items() if name.startswith(f"{stack.blocks}.")}
        records = _record_calls(model, list(stack_blocks.values()), batches)
        hidden = [record[0].hidden for record in records]
        for index, (prefix, block) in enumerate(stack_blocks.items()):
            calls = [record[index].with_hidden(states) for record, states in zip(records, hidden, strict=True)]
            linears = {name: linear for name, linear in all_linears.items() if name.startswith(f"{prefix}.")}
            for name, statistics in _collect(pruner, block, linears, calls, batches, stack.side).items():
                _require_tokens(name, statistics, pruner)
                weights[name] = _apply(layers[name], pruner.prune(layers[name], statistics))
            hidden = [block_output(block(*call.args, **call.kwargs)) for call in calls]
            if progress:
                num_done += 1
                progress(num_done, len(blocks), prefix)
    return weights


def _require_tokens(name: str, statistics: Statistics, pruner: Pruner) -> None:
    if not statistics.num_tokens:
        raise UserError(f"no calibration token reached {name}, whose inputs decide; give more or shorter examples "
                        f"(prune.num_calibration, task.max_length), or {pruner.without_inputs}")


def _record_calls(model: PreTrainedModel, blocks: list[nn.Module], batches: list[Batch]) -> list[list[_Call]]:
    """What each block is called with, by batch; of the hidden states only the first block's are kept.

    What blocks get besides hidden states seldom depends on what the blocks before them compute. Where the first batch
    shows that it does not, the blocks of the others do nothing.
    """
    records: list[list[_Call]] = []
    skips = False
    for batch in batches:
        record, outputs = _record(model, blocks, batch, skips)
        if not records and all(isinstance(output, torch.Tensor) for output in outputs):
            skipped, _ = _record(model, blocks, batch, skips=True)
            skips = all(_same_others(call, other) for call, other in zip(record, skipped, strict=True))
        records.append(record)
    return records


class _AllRecorded(Exception):
    """Ends a forward pass when the last block is called."""


def _record(model: PreTrainedModel, blocks: list[nn.Module], batch: Batch,
            skips: bool) -> tuple[list[_Call], list[Any]]:
    """(each block's call, the outputs of all blocks but the last). `skips`: blocks return their hidden states."""
    calls: list[_Call] = []
    outputs: list[Any] = []

    def record(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        call = _Call(args, kwargs)
        calls.append(call.with_hidden(None) if calls else call)
        if module is blocks[-1]:
            raise _AllRecorded

    def skip(*args: Any, **kwargs: Any) -> torch.Tensor:
        return _Call(args, kwargs).hidden

    for block in blocks if skips else []:
        block.forward = skip
    handles = [block.register_forward_hook(lambda module, args, output: outputs.append(output)) for block in blocks]
    try:
        with _pre_hooks(blocks, record):
            model(**batch.inputs(), use_cache=False)
    except _AllRecorded:
        pass
    finally:
        for handle in handles:
            handle.remove()
        for block in blocks if skips else []:
            del block.forward  # that of its class is left
    return calls, outputs


def _same_others(call: _Call, other: _Call) -> bool:
    """Whether two calls agree in all but the hidden states."""
    mine, others = call.others(), other.others()
    return len(mine) == len(others) and all(map(torch.equal, mine, others))


def _collect(pruner: Pruner, block: nn.Module, linears: dict[str, nn.Linear], calls: list[_Call], batches: list[Batch],
             side: str) -> dict[str, Statistics]:
    """Statistics of what each of `linears` (by module name) multiplies while `block` runs, padding left out."""
    collector = _Collector(pruner, linears, side)
    with _pre_hooks(linears.values(), collector.add):
        for call, batch in zip(calls, batches, strict=True):
            collector.call, collector.batch = call, batch
            block(*call.args, **call.kwargs)
            collector.finish()
    return collector.statistics


class _Collector:
    """`add` is a forward pre-hook of linears; `call` and `batch` are what the block runs on.

    Linears share their statistics as long as they get the same inputs, as those of queries, keys and values do.
    """

    call: _Call
    batch: Batch

    def __init__(self, pruner: Pruner, linears: dict[str, nn.Linear], side: str):
        self._pruner, kind = pruner, pruner.Statistics
        assert kind is not None  # or nothing would be collected
        shared = functools.cache(kind)
        self.statistics: dict[str, Statistics] = {
            name: shared(linear.in_features, linear.weight.device) for name, linear in linears.items()}
        self._names: dict[nn.Module, str] = {linear: name for name, linear in linears.items()}
        self._side = side
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

    def finish(self) -> None:
        """Add the newest inputs to the statistics of the linears that got them. Also called after each batch."""
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
                            f"{is_real.numel()}, so padding cannot be left out; {self._pruner.without_inputs}")
        return inputs.reshape(-1, inputs.shape[-1])[is_real.flatten()]


@contextmanager
def _pre_hooks(modules: Iterable[nn.Module],
               hook: Callable[[nn.Module, tuple, dict[str, Any]], None]) -> Iterator[None]:
    """`hook` is called before each of `modules` runs."""
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
