"""Prune a model block by block, each block's inputs computed by the blocks already pruned.

    per stack: one forward pass of the model; hooks catch what each block is called with
    per block: run it on the caught arguments to collect Hessians -> prune its linears -> run it again, which makes the
               next block's hidden states

A block is called as the model itself called it; nothing of a model's inside is repeated here. The decoder's arguments
are caught after the encoder is pruned, so its cross-attention learns from pruned states.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel

from sparse_train.config import PruneConfig
from sparse_train.errors import UserError
from sparse_train.models import block_output, family_of
from sparse_train.pruning.pattern import check_pattern, magnitude
from sparse_train.pruning.sparsegpt import Hessian, sparsegpt
from sparse_train.sparse import BitmaskTensor
from sparse_train.tasks import Batch


@torch.no_grad()
def prune(model: PreTrainedModel, batches: Iterable[Batch], spec: PruneConfig,
          progress: Callable[[int, int, str], None] | None = None,
          earlier: Mapping[str, torch.Tensor] | None = None) -> dict[str, BitmaskTensor]:
    """The sparse weight of every prunable linear, by module name. The model's weights become the pruned ones.

    `batches` are on the model's device and are not touched by magnitude pruning. `earlier`: name -> keep (R, C) of a
    model that was pruned before; what it dropped stays dropped. Raises UserError for a pattern that does not divide a
    width or keeps nothing of a layer, and where SparseGPT gets no token.
    """
    family = family_of(model)
    linears, earlier = family.prunable_linears(model), earlier or {}
    check_pattern({name: tuple(linear.weight.shape) for name, linear in linears.items()}, spec)
    was_training = model.training
    model.eval()
    try:
        if spec.method == "magnitude":
            return {name: _apply(linear, linear.weight * (keep := magnitude(linear.weight, spec, earlier.get(name))),
                                 keep) for name, linear in linears.items()}
        return _prune_blocks(model, family, linears, list(batches), spec, progress, earlier)
    finally:
        model.train(was_training)


def _prune_blocks(model, family, linears, batches, spec, progress, earlier) -> dict[str, BitmaskTensor]:
    weights: dict[str, BitmaskTensor] = {}
    blocks, num_done = family.blocks(model), 0
    for stack in family.stacks:
        own_blocks = {name: block for name, block in blocks.items() if name.startswith(f"{stack.blocks}.")}
        calls = [_catch_calls(model, list(own_blocks.values()), batch) for batch in batches]
        hidden = [_hidden(made[0]) for made in calls]
        for index, (prefix, block) in enumerate(own_blocks.items()):
            own = {name: linear for name, linear in linears.items() if name.startswith(f"{prefix}.")}
            now = [made[index].with_hidden(states) for made, states in zip(calls, hidden, strict=True)]
            for name, hessian in _hessians(block, own, now, batches, stack.side).items():
                if not hessian.num_tokens:
                    raise UserError(f"no calibration token reached {name}, and SparseGPT prunes by its inputs; give "
                                    "more or shorter examples (prune.num_calibration, task.max_length), or take "
                                    "prune.method=magnitude")
                weights[name] = _apply(own[name], *sparsegpt(own[name].weight, hessian.mean(), spec, name,
                                                             earlier.get(name)))
            hidden = [block_output(block(*call.args, **call.kwargs)) for call in now]
            if progress:
                num_done += 1
                progress(num_done, len(blocks), prefix)
    return weights


def _apply(linear: nn.Linear, weight: torch.Tensor, keep: torch.Tensor) -> BitmaskTensor:
    linear.weight.data.copy_(weight)
    return BitmaskTensor.from_dense(linear.weight.data, keep)


class _Call:
    """A block's arguments; its hidden states are the first one, by place or by name."""

    def __init__(self, args: tuple, kwargs: dict):
        self.args, self.kwargs = args, kwargs

    def with_hidden(self, states: torch.Tensor) -> "_Call":
        if self.args:
            return _Call((states, *self.args[1:]), self.kwargs)
        return _Call((), {**self.kwargs, "hidden_states": states})

    def others(self) -> list[torch.Tensor]:
        """Tensors among the arguments other than the hidden states: masks, positions, the encoder's states."""
        return [value for value in (*self.args[1:], *(v for k, v in self.kwargs.items() if k != "hidden_states"))
                if isinstance(value, torch.Tensor)]


def _hidden(call: _Call) -> torch.Tensor:
    return call.args[0] if call.args else call.kwargs["hidden_states"]


def _catch_calls(model, blocks, batch: Batch) -> list[_Call]:
    """What each block is called with in one forward pass; of the hidden states only the first block's are kept."""
    caught: list[_Call] = []

    def catch(module, args, kwargs):
        call = _Call(args, kwargs)
        caught.append(call if not caught else call.with_hidden(None))

    handles = [block.register_forward_pre_hook(catch, with_kwargs=True) for block in blocks]
    try:
        model(**batch.inputs(), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return caught


def _hessians(block, linears, calls: list[_Call], batches: list[Batch], side: str) -> dict[str, Hessian]:
    found = {name: Hessian(linear.in_features, linear.weight.device) for name, linear in linears.items()}
    current: list[tuple[_Call, dict[str, torch.Tensor]]] = []

    def hook(name):
        def add(module, args):
            call, attends = current[-1]
            inputs = args[0]
            # Cross-attention multiplies the encoder's states as they came in; everything else is the block's own.
            foreign = any(inputs.data_ptr() == other.data_ptr() for other in call.others())
            real = attends["encoder" if foreign else side]
            if inputs[..., 0].numel() != real.numel():
                raise UserError(f"{name} multiplies {inputs[..., 0].numel()} positions where the batch has "
                                f"{real.numel()}, so padding cannot be left out; use prune.method=magnitude")
            found[name].add(inputs.reshape(-1, inputs.shape[-1])[real.flatten()])
        return add

    handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in linears.items()]
    try:
        for call, batch in zip(calls, batches, strict=True):
            current.append((call, batch.attends))
            block(*call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found
