"""Sequence parallelism: the ranks of a group hold consecutive tokens of the same examples (Ulysses, arXiv 2309.14509).

Everything but attention works on a token alone. Attention sees all of them: an all-to-all gives each rank all tokens of
some heads, and a second one gives the result back, tokens by rank.

    (B, H, T / P, D)  -> all-to-all ->  (B, H / P, T, D)  -> attention ->  all-to-all ->  (B, H, T / P, D)

Letters: B batch, T tokens of the whole sequence, P ranks of the group, H heads, D a head's width.
"""

import types

import torch
from torch import distributed, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.models.mpt.modeling_mpt import MptAttention, build_mpt_alibi_tensor

from sparse_train.errors import UserError

_NAME = "sparse_train_sequence_parallel"


def split_tokens(tensor: torch.Tensor, group, fill: int | bool) -> torch.Tensor:
    """(B, T) -> (B, ceil(T / P)), this rank's; the sequence is padded with `fill` to a multiple of P."""
    num_ranks, rank = distributed.get_world_size(group), distributed.get_rank(group)
    padded = functional.pad(tensor, (0, -tensor.shape[1] % num_ranks), value=fill)
    return padded.chunk(num_ranks, 1)[rank].contiguous()


def parallelise_attention(model: PreTrainedModel, group) -> None:
    """Make the attention of `model` span the ranks of `group`, in place; to be done before DeepSpeed's engine.

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
    attentions = [module for module in model.modules() if isinstance(module, MptAttention)]
    for module in attentions:
        module.forward = types.MethodType(_mpt_forward(group), module)
    if attentions:
        return
    if not getattr(model, "_supports_attention_backend", False):
        raise UserError(f"model type {config.model_type!r} has an attention of its own that sequence parallelism does "
                        "not know; use sequence_parallel=1")
    AttentionInterface.register(_NAME, _interface_forward(group))
    AttentionMaskInterface.register(_NAME, lambda *args, **kwargs: None)
    model.set_attn_implementation(_NAME)
    model.register_forward_pre_hook(_global_positions(group), with_kwargs=True)


class _Exchange(torch.autograd.Function):
    """All-to-all: dimension `split` is dealt out over the ranks, dimension `join` put together from them."""

    @staticmethod
    def forward(ctx, x, group, split, join):
        ctx.group, ctx.split, ctx.join = group, split, join
        parts = torch.stack(x.chunk(distributed.get_world_size(group), split))
        received = torch.empty_like(parts)
        distributed.all_to_all_single(received, parts, group=group)
        return torch.cat(received.unbind(), join)

    @staticmethod
    def backward(ctx, grad):
        return _Exchange.apply(grad, ctx.group, ctx.join, ctx.split), None, None, None


def _to_heads(x, group):
    return _Exchange.apply(x, group, 1, 2)


def _to_tokens(x, group):
    return _Exchange.apply(x, group, 2, 1)


def _mpt_forward(group):
    """MptAttention.forward over a group: ALiBi by the slopes of this rank's heads, positions those of all tokens."""
    rank = distributed.get_rank(group)

    def forward(self, hidden_states, position_bias=None, past_key_values=None, attention_mask=None, **kwargs):
        batch, num_tokens = hidden_states.shape[:2]
        qkv = self.Wqkv(hidden_states)
        if self.clip_qkv:
            qkv = qkv.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        q, k, v = (_to_heads(part.view(batch, num_tokens, self.n_heads, self.head_dim).transpose(1, 2), group)
                   for part in qkv.chunk(3, dim=2))
        num_heads, length = q.shape[1:3]
        bias = build_mpt_alibi_tensor(self.n_heads, length, device=q.device)[rank * num_heads:][:num_heads]
        future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        scores = (q @ k.transpose(-1, -2) * self.softmax_scale + bias).masked_fill(future, torch.finfo(q.dtype).min)
        weights = functional.dropout(scores.float().softmax(-1).to(v.dtype), self.attn_dropout_p, self.training)
        context = _to_tokens(weights @ v, group).transpose(1, 2).reshape(batch, num_tokens, -1)
        return self.out_proj(context), None

    return forward


def _interface_forward(group):
    """An attention function of transformers' AttentionInterface: q (B, H, T / P, D), k and v with their own heads."""
    num_ranks = distributed.get_world_size(group)

    def forward(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        if key.shape[1] % num_ranks:  # fewer key heads than ranks: every query head gets its own copy
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
        q, k, v = (_to_heads(x, group) for x in (query, key, value))
        context = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, dropout_p=dropout,
                                                          enable_gqa=q.shape[1] != k.shape[1])
        return _to_tokens(context, group).transpose(1, 2).contiguous(), None

    return forward


def _global_positions(group):
    def hook(module: nn.Module, args, kwargs):
        num_tokens = kwargs["input_ids"].shape[1]
        first = distributed.get_rank(group) * num_tokens
        positions = torch.arange(first, first + num_tokens, device=kwargs["input_ids"].device)
        return args, {**kwargs, "position_ids": positions.unsqueeze(0)}

    return hook
