"""Prune a model block by block, each block's inputs computed by the blocks already pruned.

    batches -> inputs of block 0 (a hook catches them and ends the forward pass)
    per block: run it to collect Hessians -> prune its linears -> run it again: the next block's inputs

A block is called with the arguments the model itself gave it; nothing of its inside is repeated here.
"""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from sparse_train.config import PruneConfig
from sparse_train.models import Family, family_of
from sparse_train.models.family import block_output
from sparse_train.pruning.pattern import check_pattern, magnitude
from sparse_train.pruning.sparsegpt import Hessian, sparsegpt
from sparse_train.sparse import BitmaskTensor
from sparse_train.tasks import Batch


class _FirstBlockReached(Exception):
    pass


@torch.no_grad()
def prune(model: PreTrainedModel, batches: Iterable[Batch], spec: PruneConfig,
          progress: Callable[[int, int, str], None] | None = None) -> dict[str, BitmaskTensor]:
    """The sparse weight of every prunable linear, by module name. The model's weights become the pruned ones.

    `batches` are on the model's device and are not touched by magnitude pruning. Raises UserError for a pattern that
    does not divide a width.
    """
    family = family_of(model)
    linears = family.prunable_linears(model)
    check_pattern({name: linear.in_features for name, linear in linears.items()}, spec)
    was_training = model.training
    model.eval()
    try:
        if spec.method == "magnitude":
            return {name: _apply(linear, linear.weight * (keep := magnitude(linear.weight, spec)), keep)
                    for name, linear in linears.items()}
        return _prune_blocks(model, family, linears, batches, spec, progress)
    finally:
        model.train(was_training)


def _prune_blocks(model, family: Family, linears, batches, spec, progress) -> dict[str, BitmaskTensor]:
    blocks = family.block_list(model)
    hidden, calls, attends = _first_inputs(model, blocks[0], batches)
    weights: dict[str, BitmaskTensor] = {}
    for index, block in enumerate(blocks):
        own = {name: linear for name, linear in linears.items() if name.startswith(f"{family.blocks}.{index}.")}
        for name, hessian in _hessians(block, own, hidden, calls, attends).items():
            weights[name] = _apply(own[name], *sparsegpt(own[name].weight, hessian.mean(), spec, name))
        hidden = [block_output(block(states, *args, **kwargs))
                  for states, (args, kwargs) in zip(hidden, calls, strict=True)]
        if progress:
            progress(index + 1, len(blocks), f"block {index + 1} of {len(blocks)}")
    return weights


def _apply(linear: nn.Linear, weight: torch.Tensor, keep: torch.Tensor) -> BitmaskTensor:
    linear.weight.data.copy_(weight)
    return BitmaskTensor.from_dense(linear.weight.data, keep)


def _first_inputs(model, block, batches):
    """Per batch: hidden states (B, T, D) before the first block, its other arguments, and attend."""
    hidden, calls, attends = [], [], []

    def catch(module, args, kwargs):
        hidden.append(args[0])
        calls.append((args[1:], kwargs))
        raise _FirstBlockReached

    handle = block.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        for batch in batches:
            attends.append(batch.attend)
            try:
                model(input_ids=batch.input_ids, attention_mask=batch.attend.long(), use_cache=False)
            except _FirstBlockReached:
                continue
    finally:
        handle.remove()
    return hidden, calls, attends


def _hessians(block, linears, hidden, calls, attends) -> dict[str, Hessian]:
    found = {name: Hessian(linear.in_features, linear.weight.device) for name, linear in linears.items()}
    real: list[torch.Tensor] = []
    handles = [linear.register_forward_pre_hook(lambda module, args, name=name: found[name].add(args[0][real[-1]]))
               for name, linear in linears.items()]
    try:
        for states, (args, kwargs), attend in zip(hidden, calls, attends, strict=True):
            real.append(attend)
            block(states, *args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found
