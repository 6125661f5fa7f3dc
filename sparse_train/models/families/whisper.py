"""Whisper (arXiv 2212.04356): audio in, text out."""

from pathlib import Path
from typing import Any

from transformers import (
    AutoFeatureExtractor,
    AutoModelForSpeechSeq2Seq,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    WhisperConfig,
    WhisperFeatureExtractor,
)

from sparse_train.config import ModelConfig
from sparse_train.errors import UserError, first_line
from sparse_train.models.family import Family, Stack

MULTILINGUAL = 51_865
"""Whisper's own rule: a vocabulary of at least so many entries has languages and tasks."""

_STATES_PER_SECOND = 50  # frames of 10 ms, halved by the second convolution
_MEL_BINS = 80
_LARGEST = {"feature_size": 1_024, "sampling_rate": 1_000_000, "n_fft": 65_536, "hop_length": 65_536,
            "chunk_length": 3_600}


class Whisper(Family):
    # The convolutions in front stay dense, as embeddings, heads and norms do.
    stacks = (Stack("model.encoder.layers", "model.encoder.layer_norm", "encoder", "self_attn_layer_norm"),
              Stack("model.decoder.layers", "model.decoder.layer_norm", first_norm="self_attn_layer_norm"))
    prunable = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    takes_audio = True
    prefix_length = 4  # start, language, task, no timestamps

    def auto_class(self, config: PretrainedConfig) -> Any:
        return AutoModelForSpeechSeq2Seq

    def new_config(self, size: ModelConfig, tokens: dict[str, Any]) -> PretrainedConfig:
        return WhisperConfig(
            d_model=size.d_model, encoder_layers=size.n_layers, decoder_layers=size.n_layers,
            encoder_attention_heads=size.n_heads, decoder_attention_heads=size.n_heads, encoder_ffn_dim=size.ffn_width,
            decoder_ffn_dim=size.ffn_width, max_source_positions=round(size.window_seconds * _STATES_PER_SECOND),
            max_target_positions=size.max_seq_len, num_mel_bins=_MEL_BINS, suppress_tokens=None,
            begin_suppress_tokens=None, decoder_start_token_id=tokens["bos_token_id"], **tokens)

    def new_features(self, size: ModelConfig) -> WhisperFeatureExtractor:
        return _with_whole_samples(WhisperFeatureExtractor(feature_size=_MEL_BINS, chunk_length=size.window_seconds))

    def load_features(self, path: str | Path) -> WhisperFeatureExtractor:
        _check_sizes(path)
        return _with_whole_samples(AutoFeatureExtractor.from_pretrained(path, trust_remote_code=False))

    def needs_language(self, config: PretrainedConfig) -> bool:
        return config.vocab_size >= MULTILINGUAL

    def task_prefix(self, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig,
                    language: str | None) -> tuple[int, ...]:
        if not hasattr(tokenizer, "set_prefix_tokens") or tokenizer.convert_tokens_to_ids("<|transcribe|>") is None:
            return ()
        try:
            tokenizer.set_prefix_tokens(language=language, predict_timestamps=False,
                                        task="transcribe" if self.needs_language(config) else None)
        except ValueError as error:
            raise UserError(f"task.language={language}: {first_line(error)}") from error
        return tuple(tokenizer.prefix_tokens)


def _check_sizes(path: str | Path) -> None:
    """The extractor makes tables of these sizes when it is constructed."""
    settings, _ = WhisperFeatureExtractor.get_feature_extractor_dict(path)
    for key, largest in _LARGEST.items():
        value = settings.get(key, 1)
        if not (isinstance(value, int | float) and 0 < value <= largest):
            raise UserError(f"{path}: its preprocessor_config.json has {key}={value!r}, which must be above 0 and at "
                            f"most {largest:,}; give a folder that is not damaged")


def _with_whole_samples(features: WhisperFeatureExtractor) -> WhisperFeatureExtractor:
    """With a window of a fraction of a second transformers' own counts would be fractions."""
    features.n_samples = round(features.chunk_length * features.sampling_rate)
    features.nb_max_frames = features.n_samples // features.hop_length
    return features
