"""OPT (arXiv 2205.01068)."""

from typing import Any

from transformers import OPTConfig, PretrainedConfig

from sparse_train.config import ModelConfig
from sparse_train.models.family import Family, Stack


class Opt(Family):
    stacks = (Stack("model.decoder.layers", "model.decoder.final_layer_norm", first_norm="self_attn_layer_norm"),)
    prunable = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    needs_example_mask = True

    def new_config(self, size: ModelConfig, tokens: dict[str, Any]) -> PretrainedConfig:
        return OPTConfig(hidden_size=size.d_model, word_embed_proj_dim=size.d_model, num_hidden_layers=size.n_layers,
                         num_attention_heads=size.n_heads, ffn_dim=size.ffn_width,
                         max_position_embeddings=size.max_seq_len, **tokens)
