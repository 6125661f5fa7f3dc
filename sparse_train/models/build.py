"""New models, and the shapes of published ones: ModelConfig -> transformers' config."""

from transformers import (
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MptConfig,
    Olmo2Config,
    OPTConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    T5Config,
    WhisperConfig,
    WhisperFeatureExtractor,
)

from sparse_train.config import ModelConfig
from sparse_train.models.empty import from_config
from sparse_train.models.processor import Processor, make_processor, whole_samples

_POSITIONS_PER_SECOND = 50  # Whisper: frames of 10 ms, halved by the second convolution
_MEL_BINS = 80


def _usual(architecture):
    """Decoders whose configs share transformers' usual names."""
    def make(c: ModelConfig, **tokens) -> PretrainedConfig:
        extra = {} if architecture is GPTNeoXConfig else {"num_key_value_heads": c.n_kv_heads or c.n_heads}
        return architecture(hidden_size=c.d_model, num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads,
                            intermediate_size=c.ffn_width, max_position_embeddings=c.max_seq_len, **extra, **tokens)
    return make


def _qwen3(c: ModelConfig, **tokens) -> PretrainedConfig:
    made = _usual(Qwen3Config)(c, **tokens)
    made.head_dim = c.d_model // c.n_heads
    return made


def _mpt(c: ModelConfig, **tokens) -> PretrainedConfig:
    return MptConfig(d_model=c.d_model, n_layers=c.n_layers, n_heads=c.n_heads, max_seq_len=c.max_seq_len,
                     use_cache=True, **tokens)


def _opt(c: ModelConfig, **tokens) -> PretrainedConfig:
    return OPTConfig(hidden_size=c.d_model, word_embed_proj_dim=c.d_model, num_hidden_layers=c.n_layers,
                     num_attention_heads=c.n_heads, ffn_dim=c.ffn_width, max_position_embeddings=c.max_seq_len,
                     **tokens)


def _t5(c: ModelConfig, **tokens) -> PretrainedConfig:
    gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False} if c.family == "t5-gated" else {}
    tokens.pop("bos_token_id")
    # No dropout, as in the pretraining of T5 1.1: a new model here sees too little to overfit.
    return T5Config(d_model=c.d_model, d_kv=c.d_model // c.n_heads, d_ff=c.ffn_width, num_layers=c.n_layers,
                    num_heads=c.n_heads, dropout_rate=0.0, decoder_start_token_id=tokens["pad_token_id"], **gated,
                    **tokens)


def _whisper(c: ModelConfig, **tokens) -> PretrainedConfig:
    return WhisperConfig(
        d_model=c.d_model, encoder_layers=c.n_layers, decoder_layers=c.n_layers, encoder_attention_heads=c.n_heads,
        decoder_attention_heads=c.n_heads, encoder_ffn_dim=c.ffn_width, decoder_ffn_dim=c.ffn_width,
        max_source_positions=round(c.window_seconds * _POSITIONS_PER_SECOND), max_target_positions=c.max_seq_len,
        num_mel_bins=_MEL_BINS, suppress_tokens=None, begin_suppress_tokens=None,
        decoder_start_token_id=tokens["bos_token_id"], **tokens)


_CONFIGS = {
    "mpt": _mpt, "t5": _t5, "t5-gated": _t5, "whisper": _whisper, "llama": _usual(LlamaConfig), "opt": _opt,
    "mistral": _usual(MistralConfig), "qwen3": _qwen3, "olmo2": _usual(Olmo2Config), "gpt_neox": _usual(GPTNeoXConfig),
}


def describe(config: ModelConfig, **tokens) -> PretrainedConfig:
    """The config of the described size.

    `tokens`: vocab_size and the ids of special tokens; without them a config that only tells sizes.
    """
    ids = {"eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0}
    return _CONFIGS[config.family](config, **({"vocab_size": config.vocab_size} | ids | tokens))


def build_processor(config: ModelConfig, tokenizer) -> Processor:
    """For a new model of `config` with `tokenizer`."""
    made = describe(config, **_tokens(tokenizer))
    features = None
    if made.model_type == "whisper":
        features = whole_samples(WhisperFeatureExtractor(feature_size=_MEL_BINS, chunk_length=config.window_seconds))
    return make_processor(tokenizer, made, (made.decoder_start_token_id,) if made.is_encoder_decoder else (), features)


def build_model(config: ModelConfig, processor: Processor) -> PreTrainedModel:
    """A new model of the configured family and size, fp32, initialised from torch's global generator."""
    return from_config(describe(config, **_tokens(processor.tokenizer)))


def _tokens(tokenizer) -> dict[str, int]:
    return {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
