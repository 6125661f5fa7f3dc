"""GPT-NeoX (arXiv 2204.06745), such as Pythia."""

from typing import Any

from transformers import GPTNeoXConfig, PretrainedConfig

from sparse_train.config import ModelConfig
from sparse_train.models.family import Family, Stack, decoder_sizes


class GPTNeoX(Family):
    stacks = (Stack("gpt_neox.layers", "gpt_neox.final_layer_norm", first_norm="input_layernorm"),)
    prunable = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")

    def new_config(self, size: ModelConfig, tokens: dict[str, Any]) -> PretrainedConfig:
        return GPTNeoXConfig(**decoder_sizes(size), **tokens)
