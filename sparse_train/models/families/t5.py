"""T5 (arXiv 1910.10683), and its version 1.1 with a gated FFN and an untied head."""

from typing import Any

from transformers import PretrainedConfig, T5Config

from sparse_train.config import ModelConfig
from sparse_train.models.family import Family, Stack


class T5(Family):
    # Relative positions stay dense, as embeddings, heads and norms do.
    stacks = (Stack("encoder.block", "encoder.final_layer_norm", "encoder", "layer.0.layer_norm"),
              Stack("decoder.block", "decoder.final_layer_norm", first_norm="layer.0.layer_norm"))
    prunable = ("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo")
    ffn: dict[str, Any] = {}  # noqa: RUF012 - never changed

    def new_config(self, size: ModelConfig, tokens: dict[str, Any]) -> PretrainedConfig:
        ids = {name: token for name, token in tokens.items() if name != "bos_token_id"}
        ids["decoder_start_token_id"] = tokens["pad_token_id"]
        # No dropout, as in the pretraining of T5 1.1: a new model here sees too little to overfit.
        return T5Config(d_model=size.d_model, d_kv=size.d_model // size.n_heads, d_ff=size.ffn_width,
                        num_layers=size.n_layers, num_heads=size.n_heads, dropout_rate=0.0,
                        **self.ffn, **ids)


class GatedT5(T5):
    ffn = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}  # noqa: RUF012 - never changed
