"""Llama and the decoders that are wired like it: gated FFN, rotary positions, shared heads of keys and values."""

from typing import Any

from transformers import LlamaConfig, MistralConfig, Olmo2Config, PretrainedConfig, Qwen3Config

from sparse_train.config import ModelConfig
from sparse_train.models.family import Family, Stack, decoder_sizes


class Llama(Family):
    stacks = (Stack("model.layers", "model.norm", first_norm="input_layernorm"),)
    prunable = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    config_class: type[Any] = LlamaConfig

    def new_config(self, size: ModelConfig, tokens: dict[str, Any]) -> PretrainedConfig:
        return self.config_class(**decoder_sizes(size), num_key_value_heads=size.n_kv_heads or size.n_heads, **tokens)


class Mistral(Llama):
    config_class = MistralConfig


class Olmo2(Llama):
    stacks = (Stack("model.layers", "model.norm"),)  # its norms read what attention and FFN add
    config_class = Olmo2Config


class Qwen3(Llama):
    config_class = Qwen3Config

    def new_config(self, size: ModelConfig, tokens: dict[str, Any]) -> PretrainedConfig:
        config = super().new_config(size, tokens)
        config.head_dim = size.d_model // size.n_heads
        return config
