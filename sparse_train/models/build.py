"""New models, and the shapes of published ones: ModelConfig -> transformers' config."""

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from sparse_train.config import ModelConfig
from sparse_train.models.empty import from_config
from sparse_train.models.processor import Processor, make_processor
from sparse_train.registry import FAMILIES


def describe(size: ModelConfig, **tokens: int) -> PretrainedConfig:
    """The config of a new model of `size`.

    `tokens`: vocab_size and the ids of special tokens; without them a config that only tells sizes. Raises UserError
    for a family of which no new model can be made.
    """
    ids = {"eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0}
    family = FAMILIES.load(size.family)()
    return family.new_config(size, {"vocab_size": size.vocab_size} | ids | tokens)


def build_processor(size: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> Processor:
    """For a new model of `size` with `tokenizer`."""
    config = describe(size, **_tokens(tokenizer))
    prefix = (config.decoder_start_token_id,) if config.is_encoder_decoder else ()
    return make_processor(tokenizer, config, prefix, FAMILIES.load(size.family)().new_features(size))


def build_model(size: ModelConfig, processor: Processor) -> PreTrainedModel:
    """A new model of `size`, fp32, initialised from torch's global generator."""
    return from_config(describe(size, **_tokens(processor.tokenizer)))


def _tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    return {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
