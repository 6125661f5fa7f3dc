"""How many positions a model has. The one place that knows what the families call them."""

from transformers import PretrainedConfig

_DECODER = ("max_decoder_position_embeddings", "max_target_positions", "max_position_embeddings", "max_seq_len")
_ENCODER = ("max_encoder_position_embeddings", "max_position_embeddings")


def decoder_positions(config: PretrainedConfig) -> int | None:
    """Of the decoder, which a model without an encoder is: learned ones, those that rotary ones were trained up to, or
    as long as MPT's table of ALiBi is. None where nothing ends: T5's relative ones, other families' ALiBi, recurrence.
    """
    return _first(config.get_text_config(decoder=True), _DECODER)


def encoder_positions(config: PretrainedConfig) -> int | None:
    """Of an encoder of text. None where nothing ends, or where there is none: Whisper's takes a window of sound."""
    return _first(config.get_text_config(encoder=True), _ENCODER) if config.is_encoder_decoder else None


def _first(config: PretrainedConfig, names: tuple[str, ...]) -> int | None:
    found = next((value for name in names if (value := getattr(config, name, None))), None)
    return None if getattr(config, "alibi", False) or not found or found < 1 else found
