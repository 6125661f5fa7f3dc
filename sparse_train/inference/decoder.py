"""Decoder: a model's forward pass for one new token per row of a batch, as Steps over memory that is made once.

A prompt goes through the model itself. `PLANS` has the families that are written down here; the others, and models
whose config asks for something that is not, are decoded by the model as well.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from sparse_train.kernels import ACTIVATIONS, Steps, key_cache, put_keys

_ROPES = {"default", "linear", "llama3", "yarn"}  # their angles do not depend on how long the text is


class Decoder:
    """Letters: B rows, D width of the model, V tokens of the vocabulary."""

    def __init__(self, model: Any, num_rows: int, capacity: int):
        """`capacity`: tokens of the longest text, prompt and answer. The weights are those that the model has now."""
        self.model, self.num_rows, self.capacity = model, num_rows, capacity
        self.steps = Steps()
        self.embedding = model.get_input_embeddings().weight.detach()
        self.position = self.embedding.new_zeros(1, dtype=torch.int64)
        self._place = self.position.numpy()  # the same memory
        self.starts = self.embedding.new_zeros(num_rows, dtype=torch.int64)
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.hidden, self.normed, self.change = (self.buffer(self.embedding.shape[1]) for _ in range(3))
        norms = PLANS[model.config.model_type](self)
        self.normalise(norms, self.change)
        self.logits = self.multiply(model.get_output_embeddings(), self.normed)

    def start(self, cache: Any, length: int, attend: torch.Tensor | None) -> None:
        """Take what the prompts (B, length) left in transformers' cache, which is empty then: both may be gigabytes.
        `attend` (B, length): 0 at padding, which is on the left; None: there is none."""
        for layer, keys, values in zip(cache.layers, self.keys, self.values, strict=True):
            put_keys(keys, layer.keys)
            values[:, :, :length] = layer.values
            layer.keys = layer.values = None
        self.position.fill_(length - 1)
        self.starts.copy_(self.starts.new_zeros(1) if attend is None else attend.long().argmax(1))

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B,) the next token of each row -> (B, V) logits, which the next step overwrites."""
        torch.index_select(self.embedding, 0, tokens, out=self.hidden)
        self._place += 1
        if self._place[0] >= self.capacity:
            raise IndexError(f"the texts have {self.capacity} tokens, for which this decoder was made")
        self.steps.run()
        return self.logits

    def buffer(self, width: int) -> torch.Tensor:
        return self.embedding.new_zeros(self.num_rows, width)

    def multiply(self, linear: Any, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """A linear or a PackedLinear."""
        out = self.buffer(linear.out_features) if out is None else out
        weight = linear.weight.detach() if isinstance(linear.weight, nn.Parameter) else linear.weight
        self.steps.multiply(weight, None if linear.bias is None else linear.bias.detach(), x, out)
        return out

    def normalise(self, norm: Any, change: torch.Tensor | None) -> None:
        """The hidden states += change, normalised into `self.normed`."""
        bias = getattr(norm, "bias", None)
        epsilon = norm.eps if isinstance(norm, nn.LayerNorm) else norm.variance_epsilon
        self.steps.normalise(self.hidden, change, norm.weight.detach(), None if bias is None else bias.detach(),
                             float(epsilon), self.normed, not isinstance(norm, nn.LayerNorm))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, num_groups: int,
               head_dim: int, scale: float, **options: Any) -> None:
        """As Steps.attend, over a cache of this layer's own."""
        # Takes no memory before it is written, which is when a layer of the prompt's cache is dropped.
        self.values.append(self.embedding.new_empty(self.num_rows, num_groups, self.capacity, head_dim))
        self.keys.append(key_cache(self.values[-1]))
        self.steps.attend(q, k, v, out, self.keys[-1], self.values[-1], self.position, self.starts, scale, **options)


def can_decode(model: PreTrainedModel, capacity: int) -> bool:
    """Whether a Decoder computes what the model does, for texts of at most `capacity` tokens."""
    config = model.config
    if (config.model_type not in PLANS or any(parameter.dtype != torch.float32 or parameter.device.type != "cpu"
                                              for parameter in model.parameters())):
        return False
    window, rope = getattr(config, "sliding_window", None), getattr(config, "rope_parameters", None) or {}
    return ((window is None or capacity <= window) and rope.get("rope_type", "default") in _ROPES
            and getattr(config, "hidden_act", "gelu") in ACTIVATIONS)


def _llama(decoder: Decoder) -> nn.Module:
    """Builds the blocks; returns the final norm, which is still to be taken of the last change."""
    base, config = decoder.model.model, decoder.model.config
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, base.layers[0].self_attn.head_dim
    angles = base.rotary_emb(decoder.hidden, torch.arange(decoder.capacity, device=decoder.hidden.device)[None])
    rotation = tuple(part[0].contiguous() for part in angles)
    context, change, normed = decoder.buffer(heads * width), None, decoder.normed
    q, k, v = decoder.buffer(heads * width), decoder.buffer(groups * width), decoder.buffer(groups * width)
    gate, up = decoder.buffer(config.intermediate_size), decoder.buffer(config.intermediate_size)
    for layer in base.layers:
        attention, ffn = layer.self_attn, layer.mlp
        options: dict[str, Any] = {"rotation": rotation}
        if hasattr(attention, "q_norm"):  # Qwen3
            options |= {"norms": (attention.q_norm.weight.detach(), attention.k_norm.weight.detach()),
                        "epsilon": attention.q_norm.variance_epsilon}
        decoder.normalise(layer.input_layernorm, change)
        for linear, out in ((attention.q_proj, q), (attention.k_proj, k), (attention.v_proj, v)):
            decoder.multiply(linear, normed, out)
        decoder.attend(q, k, v, context, groups, width, attention.scaling, **options)
        change = decoder.multiply(attention.o_proj, context, decoder.change)
        decoder.normalise(layer.post_attention_layernorm, change)
        decoder.multiply(ffn.gate_proj, normed, gate)
        decoder.multiply(ffn.up_proj, normed, up)
        decoder.steps.activate(config.hidden_act, gate, up, gate)
        decoder.multiply(ffn.down_proj, gate, decoder.change)
    return base.norm


def _mpt(decoder: Decoder) -> nn.Module:
    base, heads = decoder.model.transformer, decoder.model.config.n_heads
    width = decoder.model.config.d_model
    device = decoder.hidden.device
    slopes = build_mpt_alibi_tensor(heads, 2, device=device)[:, 0, :1]
    bias = slopes * torch.arange(decoder.capacity, device=device)  # -slope times the distance
    qkv, context, inner = decoder.buffer(3 * width), decoder.buffer(width), decoder.buffer(4 * width)
    q, k, v = qkv.chunk(3, dim=1)
    change = None
    for block in base.blocks:
        attention, ffn = block.attn, block.ffn
        decoder.normalise(block.norm_1, change)
        decoder.multiply(attention.Wqkv, decoder.normed, qkv)
        if attention.clip_qkv:
            decoder.steps.add(functools.partial(qkv.clamp_, -attention.clip_qkv, attention.clip_qkv))
        decoder.attend(q, k, v, context, heads, width // heads, attention.softmax_scale, bias=bias)
        change = decoder.multiply(attention.out_proj, context, decoder.change)
        decoder.normalise(block.norm_2, change)
        decoder.multiply(ffn.up_proj, decoder.normed, inner)
        decoder.steps.activate("gelu", inner, None, inner)
        decoder.multiply(ffn.down_proj, inner, decoder.change)
    return base.norm_f


PLANS: dict[str, Callable[[Decoder], nn.Module]] = {
    "llama": _llama, "mistral": _llama, "qwen2": _llama, "qwen3": _llama, "mpt": _mpt}
"""transformers' model_type -> what adds the blocks' steps."""
