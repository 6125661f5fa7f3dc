"""How many positions a model has, under whatever name its config gives them."""

from transformers import PretrainedConfig

_DECODER = ("max_decoder_position_embeddings", "max_target_positions", "max_position_embeddings", "max_seq_len")
_ENCODER = ("max_encoder_position_embeddings", "max_position_embeddings")


def decoder_positions(config: PretrainedConfig) -> int | None:
    """Of the decoder, or of a model without an encoder: learned positions, the length that rotary ones were trained
    for, or that of MPT's table of ALiBi. None where it is unbounded: T5's relative positions, ALiBi of other families,
    recurrence.
    """
    return _first(config.get_text_config(decoder=True), _DECODER)


def encoder_positions(config: PretrainedConfig) -> int | None:
    """Of an encoder of text. None where it is unbounded or there is none: Whisper's encoder takes a window of audio."""
    return _first(config.get_text_config(encoder=True), _ENCODER) if config.is_encoder_decoder else None


def _first(config: PretrainedConfig, names: tuple[str, ...]) -> int | None:
    if getattr(config, "alibi", False):
        return None
    sizes = [getattr(config, name, None) for name in names]
    return next((size if size > 0 else None for size in sizes if size), None)
