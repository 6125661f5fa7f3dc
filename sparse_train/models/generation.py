"""The part of generation_config.json that belongs to the model: its special tokens, and those it never generates.

The rest (sampling, penalties, lengths, the number of answers) is a preference. An export keeps it for other tools; this
package generates without it.
"""

from pathlib import Path

from transformers import GenerationConfig

from sparse_train.errors import UserError

_OF_THE_MODEL = ("eos_token_id", "decoder_start_token_id", "forced_bos_token_id", "suppress_tokens",
                 "begin_suppress_tokens")


def model_tokens(generation: GenerationConfig, source: str | Path) -> dict[str, list[int]]:
    """Name -> token ids that `generation` sets. Raises UserError, naming `source`, for a value that is not one."""
    tokens: dict[str, list[int]] = {}
    for name in _OF_THE_MODEL:
        value = getattr(generation, name, None)
        if value is None:
            continue
        tokens[name] = value if isinstance(value, list) else [value]
        if not all(type(token) is int and token >= 0 for token in tokens[name]):
            raise UserError(f"{source}/generation_config.json: {name}={value!r} is no token id, nor a list of them; "
                            "give whole numbers of 0 and more, or leave it out")
    return tokens
