"""Gradients of the loss of the model as it is given, block by block from the last to the first, for methods whose
Statistics are Gradients.

    forward     the blocks one after the other, without autograd; of their inputs only those of some are kept
    head        what follows the last block, an example at a time -> the gradient of the loss by the last block's output
    backward    per block: its inputs again, from the nearest ones that were kept -> the block with autograd -> of each
                linear its inputs and the gradient of its outputs, and the gradient of the block's inputs

The loss of an example is the mean cross-entropy of its targets: that of training on this example alone. A block is
pruned when the pass has gone through it, and does not run again, so every gradient is that of the given model.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from sparse_train import dist
from sparse_train.errors import UserError
from sparse_train.models import block_output, family_of
from sparse_train.models.filled import Read, filled, replaced_forwards
from sparse_train.pruning.calls import Call
from sparse_train.pruning.collect import Visit
from sparse_train.pruning.statistics import Gradients
from sparse_train.tasks import Batch
from sparse_train.tasks.batch import IGNORED

_REMEDY = "leave it out (prune.ignore), or choose another prune.method"


def require_decoder_only(model: PreTrainedModel) -> None:
    """Raises UserError for an encoder-decoder: its encoder's gradient comes through every block of the decoder."""
    if len(family_of(model).stacks) != 1:
        raise UserError("pruning by gradients (prune.method=obert) needs a decoder-only model, and this "
                        f"{model.config.model_type} model has an encoder; choose another method")


@torch.no_grad()
def visit_backwards(model: PreTrainedModel, blocks: dict[str, nn.Module], linears: dict[str, nn.Linear],
                    records: list[list[Call]], batches: list[Batch], read: Read | None, num_done: int,
                    begin: Callable[[], None] | None) -> Iterator[Visit]:
    """As visit_blocks, from the last block to the first; `num_done` counts from the last one. `records`: what each
    block is called with, by batch. `read` gives tensors of the model that was not pruned."""
    names, modules = list(blocks), list(blocks.values())
    hidden = [record[0].hidden for record in records]
    for record in records:
        record[0] = record[0].with_hidden(None)

    def calls(index: int, inputs: list[torch.Tensor]) -> Iterator[Call]:
        return (record[index].with_hidden(states) for record, states in zip(records, inputs, strict=True))

    def in_memory(index: int) -> AbstractContextManager[None]:
        return filled(modules[index], read, names[index]) if read else nullcontext()

    def run(index: int, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        with in_memory(index):
            return [block_output(modules[index](*call.args, **call.kwargs)) for call in calls(index, inputs)]

    def outputs(index: int, inputs: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        for call, batch in zip(calls(index, inputs), batches, strict=True):
            yield block_output(modules[index](*call.args, **call.kwargs))[batch.attend]

    gradients: list[torch.Tensor] | None = None
    for num_visited, (index, inputs) in enumerate(_from_last_to_first(run, hidden, len(modules))):
        here = {name: linear for name, linear in linears.items()
                if num_visited >= num_done and name.startswith(f"{names[index]}.")}
        with in_memory(index):
            if gradients is None:
                with filled(model, read, without=modules) if read else nullcontext():
                    gradients = _through_head(model, modules, calls(index, inputs), batches)
            if begin and num_visited == num_done:
                begin()
            statistics, gradients = _through_block(modules[index], here, calls(index, inputs), batches, gradients)
            if num_visited >= num_done:
                yield Visit(names[index], here, statistics, partial(outputs, index, inputs))
            statistics.clear()  # the caller's loop still holds them while the next ones are collected


def _from_last_to_first(run: Callable[[int, list[torch.Tensor]], list[torch.Tensor]], inputs: list[torch.Tensor],
                        num_blocks: int) -> Iterator[tuple[int, list[torch.Tensor]]]:
    """(index, inputs by batch) of each block. `run`: index and inputs -> outputs; `inputs`: of the first block.

    Those of every k-th block are kept, k being the root of their number; the others are computed again from these.
    """
    every = max(1, math.isqrt(num_blocks))
    kept = {0: inputs}
    for index in range(num_blocks - 1):
        inputs = run(index, inputs)
        if (index + 1) % every == 0:
            kept[index + 1] = inputs
    stop = num_blocks
    for start in sorted(kept, reverse=True):
        between = [kept.pop(start)]
        for index in range(start, stop - 1):
            between.append(run(index, between[-1]))
        for index in range(stop - 1, start - 1, -1):
            yield index, between.pop()
        stop = start


def _through_head(model: PreTrainedModel, blocks: list[nn.Module], calls: Iterable[Call],
                  batches: list[Batch]) -> list[torch.Tensor]:
    """The gradients of the examples' losses by the last block's outputs, by batch. Collective. `calls`: of that block.
    Raises UserError where a loss is not finite."""
    found = []

    def run() -> None:
        for number, (call, batch) in enumerate(zip(calls, batches, strict=True)):
            output = blocks[-1](*call.args, **call.kwargs)
            rows: list[torch.Tensor] = []
            for row in range(len(batch.input_ids)):
                states = block_output(output)[row:row + 1].detach().requires_grad_()
                returned = (states, *output[1:]) if isinstance(output, tuple) else states
                loss = _loss(model, blocks, returned, _example(batch, row))
                if not torch.isfinite(loss):
                    raise UserError(f"the loss of example {row + 1} of calibration batch "
                                    f"{1 + dist.rank() + number * dist.world_size()} is not finite; the dense model is "
                                    "damaged or overflows")
                rows += torch.autograd.grad(loss, states)
            found.append(torch.cat(rows))

    dist.agree(run)
    return found


def _example(batch: Batch, row: int) -> Batch:
    one = slice(row, row + 1)
    return Batch(batch.input_ids[one], batch.attend[one], batch.labels[one],
                 positions=None if batch.positions is None else batch.positions[one])


@torch.enable_grad()
def _loss(model: PreTrainedModel, blocks: list[nn.Module], returned: Any, example: Batch) -> torch.Tensor:
    """Where every block returns `returned`; 0 where nothing is predicted."""
    with replaced_forwards(dict.fromkeys(blocks, lambda *args, **kwargs: returned)):
        logits = model(**example.inputs(), use_cache=False).logits
    targets = example.targets.flatten()
    total = functional.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=IGNORED, reduction="sum")
    return total / (targets != IGNORED).sum().clamp(min=1)


def _through_block(block: nn.Module, linears: dict[str, nn.Linear], calls: Iterable[Call], batches: list[Batch],
                   gradients: list[torch.Tensor]) -> tuple[dict[str, Any], list[torch.Tensor]]:
    """(Gradients of `linears` by name, gradients by the block's inputs); `gradients` are those by its outputs.
    Collective."""
    statistics = {name: Gradients() for name in linears}
    found = []

    def run() -> None:
        for call, batch, gradient in zip(calls, batches, gradients, strict=True):
            states = call.hidden.detach().requires_grad_()
            call = call.with_hidden(states)
            with torch.enable_grad(), _recorded(linears, batch) as seen:
                output = block_output(block(*call.args, **call.kwargs))
                found.append(torch.autograd.grad(output, states, gradient)[0])
            for name, of_linear in statistics.items():
                of_linear.batches.append(seen[name])

    dist.agree(run)
    return statistics, found


@contextmanager
def _recorded(linears: dict[str, nn.Linear], batch: Batch) -> Iterator[dict[str, list]]:
    """By name, an entry of Gradients.batches, which fills when the linears have run forward and backward inside."""
    seen: defaultdict[str, list] = defaultdict(list)

    def watch(name: str, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        if inputs.shape[:-1] not in (batch.attend.shape, (batch.attend.numel(),)):
            raise UserError(f"{name} multiplies positions {tuple(inputs.shape[:-1])} where the batch has "
                            f"{tuple(batch.attend.shape)}, so the gradients of its examples cannot be told apart; "
                            f"{_REMEDY}")
        inputs, version, shape = inputs.detach(), inputs._version, (*batch.attend.shape, -1)

        def add(gradient: torch.Tensor) -> None:
            if inputs._version != version:
                raise UserError(f"the block writes into what {name} has multiplied, so its gradient is lost; {_REMEDY}")
            seen[name].append((inputs.reshape(shape), gradient.reshape(shape)))

        # A hook on the tensor gets the gradient of what the linear gave, whatever writes into it later.
        outputs.register_hook(add)

    handles = [linear.register_forward_hook(lambda _, args, output, name=name: watch(name, args[0], output))
               for name, linear in linears.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
