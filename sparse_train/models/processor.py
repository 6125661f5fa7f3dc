"""Processor: what turns text and audio into a model's inputs; it is stored in the model's folder."""

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase, WhisperFeatureExtractor

from sparse_train.errors import UserError
from sparse_train.models.config import read_config, read_generation, reading
from sparse_train.models.families import family_of_type
from sparse_train.models.generation import model_tokens
from sparse_train.models.gguf import as_folder
from sparse_train.models.positions import decoder_positions, encoder_positions


@dataclass(frozen=True)
class Processor:
    tokenizer: PreTrainedTokenizerBase
    decoder_prefix: tuple[int, ...] = ()
    """Tokens that an encoder-decoder's answers start from; empty for models without an encoder."""
    features: WhisperFeatureExtractor | None = None
    """Speech models: audio -> log-mel spectrogram of the model's window."""
    positions: int | None = None
    """Of the decoder, or of a model without an encoder; None: unbounded."""
    encoder_positions: int | None = None
    """Of an encoder of text."""
    num_embedded: int | None = None
    """Rows of the embedding: token ids that the model knows; None where its config does not say."""

    def save_pretrained(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)
        if self.features is not None:
            self.features.save_pretrained(folder)


def make_processor(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, decoder_prefix: tuple[int, ...] = (),
                   features: WhisperFeatureExtractor | None = None) -> Processor:
    """For the model of `config`."""
    return Processor(tokenizer, decoder_prefix, features, decoder_positions(config), encoder_positions(config),
                     getattr(config.get_text_config(decoder=True), "vocab_size", None))


def load_processor(path: str | Path, language: str | None = None, packed: bool = False) -> Processor:
    """Of a folder, hub name or GGUF file. A tokenizer without a padding token pads with its end-of-text token.

    `language`: of speech, for Whisper's multilingual tokenizers. `packed`: as in read_config. Raises UserError where
    there is no tokenizer, or one that does not fit the model.
    """
    path = as_folder(path)
    config = read_config(path, packed)
    family = family_of_type(config.model_type)
    with reading(path, "a tokenizer", "the folder needs its files, such as tokenizer.json"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    with reading(path, "a feature extractor"):
        features = family.load_features(path)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: its tokenizer names no end-of-text token, with which every answer ends; name one as "
                        "eos_token in its tokenizer_config.json")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    prefix = _decoder_prefix(path, config) if config.is_encoder_decoder else ()
    prefix = family.task_prefix(tokenizer, config, language) or prefix
    processor = make_processor(tokenizer, config, prefix, features)
    with reading(path, "a tokenizer"):
        _check_embedded(path, processor)
    return processor


def _decoder_prefix(path: str | Path, config: PretrainedConfig) -> tuple[int, ...]:
    """The start token, and the first token that some models must generate, such as BART's beginning-of-text."""
    tokens = model_tokens(read_generation(path), path)
    start = config.decoder_start_token_id
    first = [start] if start is not None else tokens.get("decoder_start_token_id", [])
    if not first:
        raise UserError(f"{path}: its config.json names no decoder_start_token_id, from which every answer starts; "
                        "name one")
    return (*first, *tokens.get("forced_bos_token_id", []))


def _check_embedded(path: str | Path, processor: Processor) -> None:
    """Raises UserError where a token that texts use is beyond the embedding.

    An added token that no text uses, such as one for images, may be; an example that has it is left out later.
    """
    tokenizer = processor.tokenizer
    added = tokenizer.added_tokens_decoder.keys()
    used = [tokenizer.pad_token_id, tokenizer.eos_token_id, *processor.decoder_prefix, *tokenizer.encode("a"),
            *(token for token in tokenizer.get_vocab().values() if token not in added)]
    if processor.num_embedded is not None and max(used) >= processor.num_embedded:
        raise UserError(f"{path}: its tokenizer uses token ids up to {max(used)}, but the model's embedding has only "
                        f"{processor.num_embedded:,} rows (vocab_size); resize the embedding (transformers' "
                        "resize_token_embeddings), or give the tokenizer that belongs to the model")
