"""MPT, the paper's model: ALiBi (arXiv 2108.12409) instead of embedded positions."""

import math
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import MptConfig, PretrainedConfig, PreTrainedModel
from transformers.models.mpt.modeling_mpt import MptAttention, build_mpt_alibi_tensor

from sparse_train.config import ModelConfig
from sparse_train.errors import UserError
from sparse_train.models.family import Family, HeadExchange, Stack

# transformers' MPT computes with these values whatever the config says; another value would silently be another model.
_ATTENTION = {"attn_type": "multihead_attention", "qk_ln": False, "alibi": True, "alibi_bias_max": 8,
              "prefix_lm": False, "rope": False}
_MODEL = {"logit_scale": None}
_LARGEST_ALIBI = 1 << 28


class Mpt(Family):
    stacks = (Stack("transformer.blocks", "transformer.norm_f", first_norm="norm_1"),)
    prunable = ("Wqkv", "out_proj", "up_proj", "down_proj")
    needs_example_mask = True

    def new_config(self, size: ModelConfig, tokens: dict[str, Any]) -> PretrainedConfig:
        return MptConfig(d_model=size.d_model, n_layers=size.n_layers, n_heads=size.n_heads,
                         max_seq_len=size.max_seq_len, use_cache=True, **tokens)

    def check_config(self, source: str | Path, config: dict[str, Any]) -> None:
        sizes = [config.get(key) for key in ("n_heads", "max_seq_len")]
        num_entries = math.prod(size for size in sizes if isinstance(size, int))
        if num_entries > _LARGEST_ALIBI:
            raise UserError(f"{source}: n_heads * max_seq_len of its config.json is {num_entries:,}, and a table of so "
                            f"many numbers is made for each token; give a model of at most {_LARGEST_ALIBI:,}")
        for values, section in ((_ATTENTION, config.get("attn_config") or {}), (_MODEL, config)):
            for key, value in values.items():
                if section.get(key, value) != value:
                    raise UserError(f"{source}: {key}={section[key]} is not supported, transformers computes every mpt "
                                    f"model as if it were {value}; give one that is")

    def split_attention(self, model: PreTrainedModel, exchange: HeadExchange) -> bool:
        for module in model.modules():
            if isinstance(module, MptAttention):
                module.forward = types.MethodType(_split_forward(exchange), module)  # type: ignore[method-assign]
        return True


def _split_forward(exchange: HeadExchange) -> Callable[..., tuple[torch.Tensor, None]]:
    """MptAttention.forward over all tokens: ALiBi by the slopes of this rank's heads."""
    def forward(self, hidden_states, position_bias=None, past_key_values=None, attention_mask=None, **kwargs):
        batch, num_tokens = hidden_states.shape[:2]
        qkv = self.Wqkv(hidden_states)
        if self.clip_qkv:
            qkv = qkv.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        q, k, v = (exchange.to_heads(part.view(batch, num_tokens, self.n_heads, self.head_dim).transpose(1, 2))
                   for part in qkv.chunk(3, dim=2))
        num_heads, length = q.shape[1:3]
        bias = build_mpt_alibi_tensor(self.n_heads, length, device=q.device)[exchange.rank * num_heads:][:num_heads]
        future = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        scores = (q @ k.transpose(-1, -2) * self.softmax_scale + bias).masked_fill(future, torch.finfo(q.dtype).min)
        weights = functional.dropout(scores.float().softmax(-1).to(v.dtype), self.attn_dropout_p, self.training)
        context = exchange.to_tokens(weights @ v).transpose(1, 2).reshape(batch, num_tokens, -1)
        return self.out_proj(context), None

    return forward
