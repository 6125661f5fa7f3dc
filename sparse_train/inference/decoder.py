"""Decoder: a model's forward pass for one new token per row of a batch, as Steps over memory that is made once.

A prompt, and what an encoder reads, go through the model itself. `PLANS` has the families that are written down here;
the others, and models whose config asks for something that is not, are decoded by the model as well.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import EncoderDecoderCache, PreTrainedModel
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

from sparse_train.config.base import Precision
from sparse_train.kernels import ACTIVATIONS, PackedMatrix, Steps
from sparse_train.models.checkpoint import DTYPES

_ROPES = {"default", "linear", "llama3", "yarn"}  # their angles do not depend on how long the text is
_NAMES_OF_ACTIVATIONS = ("hidden_act", "activation_function", "dense_act_fn")  # in a config; MPT has none, but GELU


class _Cache:
    """Keys and values of the blocks, of rows that may begin late and end together."""

    def __init__(self, steps: Steps, like: torch.Tensor, num_rows: int, capacity: int):
        """`like`: a tensor of the type and on the device of what it holds, for `steps` to attend to."""
        self.capacity, self._steps, self._like = capacity, steps, like
        self.position = like.new_zeros(1, dtype=torch.int64)  # the last one
        self.starts = like.new_zeros(num_rows, dtype=torch.int64)
        self._blocks: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add_block(self, num_groups: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        # Takes no memory before it is written, which is when a layer of the prompt's cache is dropped.
        values = self._like.new_empty(len(self.starts), num_groups, self.capacity, head_dim)
        self._blocks.append((self._steps.key_cache(values), values))
        return self._blocks[-1]

    def take(self, cache: Any, attend: torch.Tensor | None) -> None:
        """Take what transformers' cache holds of T positions, which is empty then: both may be gigabytes.

        `attend` (B, T): 0 at padding, None: there is none. Attention does not see the order of what it attends to, so
        padding that is not on the left, as an encoder's, is moved there.
        """
        order = None
        if attend is None:
            self.starts.zero_()
        else:
            self.starts.copy_((attend == 0).sum(1))
            if (attend[:, 1:] < attend[:, :-1]).any():
                order = attend.long().argsort(dim=1, stable=True)[:, None, :, None]
        # transformers may have made as many layers as the encoder has.
        for layer, (keys, values) in zip(cache.layers, self._blocks, strict=False):
            length = layer.keys.shape[2]
            self.position.fill_(length - 1)
            found = (part if order is None else part.gather(2, order.expand_as(part))
                     for part in (layer.keys, layer.values))
            self._steps.put_keys(keys, next(found))
            values[:, :, :length] = next(found)
            layer.keys = layer.values = None


class Decoder:
    """Letters: B rows, D width of the model, V tokens of the vocabulary."""

    def __init__(self, model: Any, num_rows: int, capacity: int, num_states: int = 0, kv_cache: Precision = "fp32"):
        """`capacity`: tokens of the longest text, prompt and answer. `num_states`: of the encoder, where there is one.
        `kv_cache`: what keys and values are stored in on the CPU, of the text and of the encoder's states. The weights
        are those that the model has now."""
        self.model, self.num_rows, self.capacity = model, num_rows, capacity
        table = model.get_input_embeddings().weight
        self.steps, self._like = steps_for(table.device), torch.empty(0, dtype=table.dtype, device=table.device)
        stored = self._like.to(DTYPES[kv_cache]) if table.device.type == "cpu" else self._like
        self.text = _Cache(self.steps, stored, num_rows, capacity)
        self.encoded = _Cache(self.steps, stored, num_rows, num_states)
        self.num_states, self._length = num_states, 0
        self._buffers: dict[tuple[str, int], torch.Tensor] = {}
        self.hidden, self.normed, self.change = (self.buffer(name, table.shape[1])
                                                 for name in ("hidden", "normed", "change"))
        self._tokens = self._like.new_zeros(num_rows, dtype=torch.int64)
        self.steps.embed(table if isinstance(table, PackedMatrix) else table.detach(), self._tokens, self.hidden)
        self.steps.add(functools.partial(self.text.position.add_, 1))
        PLANS[model.config.model_type](self)
        self.logits = self.multiply(model.get_output_embeddings(), self.normed, "logits")

    def start(self, cache: Any, attend: torch.Tensor | None, attend_encoder: torch.Tensor | None = None) -> None:
        """Take what the prompts (B, T), and the encoder, left in transformers' cache. `attend` (B, T): 0 at padding,
        which is on the left; `attend_encoder` (B, states): 0 at padding; one
        of another length is of what the encoder reads, and left out. None: there is none."""
        if isinstance(cache, EncoderDecoderCache):
            encoded = cache.cross_attention_cache
            if attend_encoder is not None and attend_encoder.shape[1] != encoded.get_seq_length():
                attend_encoder = None  # Whisper's, of the spectrogram: its attention to the states reads none
            self.encoded.take(encoded, attend_encoder)
            cache = cache.self_attention_cache
        self._length = cache.get_seq_length()
        self.text.take(cache, attend)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B,) the next token of each row -> (B, V) logits, which the next step overwrites."""
        if self._length == self.capacity:
            raise IndexError(f"the texts have {self.capacity} tokens, for which this decoder was made")
        self._length += 1
        self._tokens.copy_(tokens)
        self.steps.run()
        return self.logits

    def buffer(self, name: str, width: int) -> torch.Tensor:
        """(B, width), one for all blocks."""
        return self._buffers.setdefault((name, width), self._like.new_zeros(self.num_rows, width))

    def multiply(self, linear: Any, x: torch.Tensor, out: str) -> torch.Tensor:
        """A linear or a PackedLinear, into the buffer of that name."""
        y = self.buffer(out, linear.out_features)
        weight = linear.weight.detach() if isinstance(linear.weight, nn.Parameter) else linear.weight
        self.steps.multiply(weight, None if linear.bias is None else linear.bias.detach(), x, y)
        return y

    def normalise(self, norm: Any, change: torch.Tensor | None) -> None:
        """The hidden states += change, normalised into `self.normed`."""
        bias = getattr(norm, "bias", None)
        epsilon = norm.eps if isinstance(norm, nn.LayerNorm) else norm.variance_epsilon
        self.steps.normalise(self.hidden, change, norm.weight.detach(), None if bias is None else bias.detach(),
                             float(epsilon), self.normed, not isinstance(norm, nn.LayerNorm))

    def attend(self, q: torch.Tensor, k: torch.Tensor | None, v: torch.Tensor | None, head_dim: int, scale: float,
               **options: Any) -> torch.Tensor:
        """As Steps.attend, over a cache of this block's own: of the text, or without k and v of the encoder's states.
        Returns the heads' results."""
        cache = self.encoded if k is None else self.text
        keys, values = cache.add_block((q if k is None else k).shape[1] // head_dim, head_dim)
        out = self.buffer("context", q.shape[1])
        self.steps.attend(q, k, v, out, keys, values, cache.position, cache.starts, scale, **options)
        return out

    def attention(self, q: Any, k: Any, v: Any, out: Any, head_dim: int, scale: float, **options: Any) -> torch.Tensor:
        """The change by attention of the normalised states; linears, as `attend` has their results."""
        query = self.multiply(q, self.normed, "q")
        key, value = (None if linear is None else self.multiply(linear, self.normed, name)
                      for name, linear in (("k", k), ("v", v)))
        return self.multiply(out, self.attend(query, key, value, head_dim, scale, **options), "change")

    def feed_forward(self, activation: str, first: Any, factor: Any, last: Any) -> torch.Tensor:
        """The change last(f(first(x)) * factor(x)) of the normalised states x; linears, a factor where there is one."""
        inner = self.multiply(first, self.normed, "inner")
        gate = None if factor is None else self.multiply(factor, self.normed, "factor")
        self.steps.activate(activation, inner, gate, inner)
        return self.multiply(last, inner, "change")


def steps_for(device: torch.device) -> Steps:
    """None yet, for memory of this device."""
    if device.type == "cpu":
        return Steps()
    from sparse_train.kernels.triton_steps import GraphSteps  # Triton is an extra

    return GraphSteps(device)


def can_decode(model: PreTrainedModel, capacity: int) -> bool:
    """Whether a Decoder computes what the model does, for texts of at most `capacity` tokens."""
    config, kinds = model.config, {(parameter.dtype, parameter.device.type) for parameter in model.parameters()}
    is_fit = kinds == {(torch.float32, "cpu")} or [device for _, device in kinds] == ["cuda"]
    if config.model_type not in PLANS or not is_fit:
        return False
    window, rope = getattr(config, "sliding_window", None), getattr(config, "rope_parameters", None) or {}
    return ((window is None or capacity <= window) and rope.get("rope_type", "default") in _ROPES
            and all(getattr(config, name, "gelu") in ACTIVATIONS for name in _NAMES_OF_ACTIVATIONS))


def _llama(decoder: Decoder) -> None:
    base, config = decoder.model.model, decoder.model.config
    angles = base.rotary_emb(decoder.hidden, torch.arange(decoder.capacity, device=decoder.hidden.device)[None])
    rotation, change = tuple(part[0].contiguous() for part in angles), None
    for layer in base.layers:
        attention, ffn = layer.self_attn, layer.mlp
        options: dict[str, Any] = {"rotation": rotation}
        if hasattr(attention, "q_norm"):  # Qwen3
            options |= {"norms": (attention.q_norm.weight.detach(), attention.k_norm.weight.detach()),
                        "epsilon": attention.q_norm.variance_epsilon}
        decoder.normalise(layer.input_layernorm, change)
        change = decoder.attention(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj,
                                   attention.head_dim, attention.scaling, **options)
        decoder.normalise(layer.post_attention_layernorm, change)
        change = decoder.feed_forward(config.hidden_act, ffn.gate_proj, ffn.up_proj, ffn.down_proj)
    decoder.normalise(base.norm, change)


def _mpt(decoder: Decoder) -> None:
    base, heads = decoder.model.transformer, decoder.model.config.n_heads
    device = decoder.hidden.device
    slopes = build_mpt_alibi_tensor(heads, 2, device=device)[:, 0, :1]
    bias = slopes * torch.arange(decoder.capacity, device=device)  # -slope times the distance
    change = None
    for block in base.blocks:
        attention, ffn = block.attn, block.ffn
        decoder.normalise(block.norm_1, change)
        qkv = decoder.multiply(attention.Wqkv, decoder.normed, "qkv")
        if attention.clip_qkv:
            decoder.steps.add(functools.partial(qkv.clamp_, -attention.clip_qkv, attention.clip_qkv))
        q, k, v = qkv.chunk(3, dim=1)
        context = decoder.attend(q, k, v, q.shape[1] // heads, attention.softmax_scale, bias=bias)
        change = decoder.multiply(attention.out_proj, context, "change")
        decoder.normalise(block.norm_2, change)
        change = decoder.feed_forward("gelu", ffn.up_proj, None, ffn.down_proj)
    decoder.normalise(base.norm_f, change)


def _t5(decoder: Decoder) -> None:
    base, config = decoder.model.decoder, decoder.model.config
    last = decoder.capacity - 1
    biases = base.block[0].layer[0].SelfAttention.compute_bias(1, last + 1, past_seen_tokens=last)  # for all blocks
    bias, change = biases[0, :, 0].detach().flip(1).contiguous(), None  # by the distance from the last position
    for block in base.block:
        own, cross, ffn = block.layer[0].SelfAttention, block.layer[1].EncDecAttention, block.layer[2].DenseReluDense
        decoder.normalise(block.layer[0].layer_norm, change)
        change = decoder.attention(own.q, own.k, own.v, own.o, config.d_kv, own.scaling, bias=bias)
        decoder.normalise(block.layer[1].layer_norm, change)
        change = decoder.attention(cross.q, None, None, cross.o, config.d_kv, cross.scaling)
        decoder.normalise(block.layer[2].layer_norm, change)
        first, factor = (ffn.wi_0, ffn.wi_1) if config.is_gated_act else (ffn.wi, None)
        change = decoder.feed_forward(config.dense_act_fn, first, factor, ffn.wo)
    decoder.normalise(base.final_layer_norm, change)
    if getattr(config, "scale_decoder_outputs", False):  # the first version, not 1.1 and mT5
        decoder.steps.add(functools.partial(decoder.normed.mul_, config.d_model**-0.5))


def _whisper(decoder: Decoder) -> None:
    base, text, change = decoder.model.model.decoder, decoder.text, decoder.change
    table, places = base.embed_positions.weight.detach(), torch.zeros_like(text.starts)
    decoder.steps.add(functools.partial(torch.sub, text.position, text.starts, out=places))
    decoder.steps.add(functools.partial(torch.index_select, table, 0, places, out=change))
    for layer in base.layers:
        own, cross = layer.self_attn, layer.encoder_attn
        decoder.normalise(layer.self_attn_layer_norm, change)
        change = decoder.attention(own.q_proj, own.k_proj, own.v_proj, own.out_proj, own.head_dim, own.scaling)
        decoder.normalise(layer.encoder_attn_layer_norm, change)
        change = decoder.attention(cross.q_proj, None, None, cross.out_proj, cross.head_dim, cross.scaling)
        decoder.normalise(layer.final_layer_norm, change)
        change = decoder.feed_forward(base.config.activation_function, layer.fc1, None, layer.fc2)
    decoder.normalise(base.layer_norm, change)


PLANS: dict[str, Callable[[Decoder], None]] = {
    "llama": _llama, "mistral": _llama, "qwen2": _llama, "qwen3": _llama, "mpt": _mpt, "t5": _t5, "mt5": _t5,
    "whisper": _whisper}
"""transformers' model_type -> what adds the steps of its blocks and of the norm behind them."""
