"""Sequence parallelism: the ranks of a group hold consecutive tokens of the same examples (Ulysses, arXiv 2309.14509).

Everything but attention works on single tokens. For attention, an all-to-all gives each rank all tokens of some of the
heads, and a second one returns the result to the ranks of the tokens.

    (B, H, T / P, D)  -> all-to-all ->  (B, H / P, T, D)  -> attention ->  all-to-all ->  (B, H, T / P, D)

Letters: B batch, T tokens of the whole sequence, P ranks of the group, H heads, D a head's width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import distributed, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from sparse_train.compat.transformers import supports_attention_interface
from sparse_train.errors import UserError
from sparse_train.models import family_of_type
from sparse_train.tasks import Batch
from sparse_train.tasks.batch import IGNORED

_NAME = "sparse_train_sequence_parallel"


def split_tokens(tensor: torch.Tensor, group: distributed.ProcessGroup, fill: int | bool) -> torch.Tensor:
    """This rank's part (B, ceil(T / P)) of `tensor` (B, T), which is padded with `fill` to a multiple of P."""
    num_ranks, rank = distributed.get_world_size(group), distributed.get_rank(group)
    padded = functional.pad(tensor, (0, -tensor.shape[1] % num_ranks), value=fill)
    return padded.chunk(num_ranks, 1)[rank].contiguous()


def split_batch(batch: Batch, group: distributed.ProcessGroup) -> Batch:
    """This rank's tokens of a decoder's batch."""
    return Batch(input_ids=split_tokens(batch.input_ids, group, 0), attend=split_tokens(batch.attend, group, False),
                 labels=split_tokens(batch.labels, group, IGNORED))


def parallelise_attention(model: PreTrainedModel, group: distributed.ProcessGroup) -> None:
    """Make the attention of `model` span the ranks of `group`, in place; call it before DeepSpeed's engine is built.

    From then on the model is called with this rank's tokens. Batches must be padded on the right: causal attention then
    needs no padding mask. Raises UserError for a model whose heads cannot be divided.
    """
    num_ranks, config = distributed.get_world_size(group), model.config
    if config.is_encoder_decoder:
        raise UserError(f"model type {config.model_type!r} has an encoder, whose tokens sequence parallelism does not "
                        "split; use sequence_parallel=1")
    if config.num_attention_heads % num_ranks:
        raise UserError(f"{config.num_attention_heads} heads cannot be divided over {num_ranks} ranks of a sequence; "
                        "use a number of ranks that divides them")
    exchange = _GroupExchange(group)
    if family_of_type(config.model_type).split_attention(model, exchange):
        return
    if not supports_attention_interface(model):
        raise UserError(f"model type {config.model_type!r} has an attention that sequence parallelism does not "
                        "support; use sequence_parallel=1")
    AttentionInterface.register(_NAME, _interface_forward(exchange))
    AttentionMaskInterface.register(_NAME, lambda *args, **kwargs: None)
    model.set_attn_implementation(_NAME)
    model.register_forward_pre_hook(_global_positions(group), with_kwargs=True)


class _Exchange(torch.autograd.Function):
    """All-to-all: dimension `split` is divided among the ranks, and dimension `join` assembled from them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: distributed.ProcessGroup, split: int, join: int) -> torch.Tensor:
        ctx.group, ctx.split, ctx.join = group, split, join
        parts = torch.stack(x.chunk(distributed.get_world_size(group), split))
        received = torch.empty_like(parts)
        distributed.all_to_all_single(received, parts, group=group)
        return torch.cat(received.unbind(), join)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _Exchange.apply(grad, ctx.group, ctx.join, ctx.split), None, None, None


class _GroupExchange:
    """sparse_train.models.family.HeadExchange over the ranks of a group."""

    def __init__(self, group: distributed.ProcessGroup):
        self._group = group
        self.num_ranks, self.rank = distributed.get_world_size(group), distributed.get_rank(group)

    def to_heads(self, x: torch.Tensor) -> torch.Tensor:
        return _Exchange.apply(x, self._group, 1, 2)

    def to_tokens(self, x: torch.Tensor) -> torch.Tensor:
        return _Exchange.apply(x, self._group, 2, 1)


def _interface_forward(exchange: _GroupExchange) -> Callable[..., tuple[torch.Tensor, None]]:
    """A function for transformers' AttentionInterface: q (B, H, T / P, D), k and v with their number of heads."""
    def forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        if key.shape[1] % exchange.num_ranks:  # too few key heads to divide: copy them, one per query head
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        q, k, v = (exchange.to_heads(x) for x in (query, key, value))
        context = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout,
                                                          enable_gqa=q.shape[1] != k.shape[1])
        return exchange.to_tokens(context).transpose(1, 2).contiguous(), None

    return forward


def _global_positions(group: distributed.ProcessGroup) -> Callable[..., Any]:
    """A hook that gives the model the positions of this rank's tokens in the whole sequence."""
    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        num_tokens = kwargs["input_ids"].shape[1]
        first = distributed.get_rank(group) * num_tokens
        positions = torch.arange(first, first + num_tokens, device=kwargs["input_ids"].device)
        return args, {**kwargs, "position_ids": positions.unsqueeze(0)}

    return hook
