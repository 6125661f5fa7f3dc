"""Processor: what turns text and sound into a model's inputs; it lives in the model's folder."""

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoFeatureExtractor, AutoTokenizer, PreTrainedTokenizerBase, WhisperFeatureExtractor

from sparse_train.errors import UserError
from sparse_train.models.checkpoint import first_line, read_config, reading

MULTILINGUAL = 51_865
"""Whisper's own rule: a tokenizer with at least so many entries knows languages and tasks."""


@dataclass(frozen=True)
class Processor:
    tokenizer: PreTrainedTokenizerBase
    decoder_prefix: tuple[int, ...] = ()
    """What an encoder-decoder's decoder starts from; empty for models without an encoder."""
    features: WhisperFeatureExtractor | None = None
    """Speech models: sound -> log-mel spectrogram of the model's window."""

    def save_pretrained(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)
        if self.features is not None:
            self.features.save_pretrained(folder)


def load_processor(path: str | Path, language: str | None = None) -> Processor:
    """Of a folder or hub name. A tokenizer without a padding token pads with its end-of-text token.

    `language`: of speech, for Whisper's multilingual tokenizers. Raises UserError where there is none to read.
    """
    config = read_config(path)
    features = None
    with reading(path, "a tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if config.model_type == "whisper":
        with reading(path, "a feature extractor"):
            features = whole_samples(AutoFeatureExtractor.from_pretrained(path, trust_remote_code=False))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    prefix = (config.decoder_start_token_id,) if config.is_encoder_decoder else ()
    if hasattr(tokenizer, "set_prefix_tokens") and tokenizer.convert_tokens_to_ids("<|transcribe|>") is not None:
        try:
            tokenizer.set_prefix_tokens(language=language, predict_timestamps=False,
                                        task="transcribe" if config.vocab_size >= MULTILINGUAL else None)
        except ValueError as error:
            raise UserError(f"task.language={language}: {first_line(error)}") from error
        prefix = tuple(tokenizer.prefix_tokens)
    return Processor(tokenizer, prefix, features)


def whole_samples(features: WhisperFeatureExtractor) -> WhisperFeatureExtractor:
    """A window of a fraction of a second makes transformers' own counts fractions."""
    features.n_samples = round(features.chunk_length * features.sampling_rate)
    features.nb_max_frames = features.n_samples // features.hop_length
    return features
