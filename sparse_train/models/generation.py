"""What of a folder's generation_config.json belongs to the model: its special tokens, and those that it never says.

The rest of it (sampling, penalties, lengths, how many answers) is taste. An export keeps it for other tools; no answer
or score here is made with it.
"""

from typing import Any

from transformers import GenerationConfig

from sparse_train.errors import UserError

_OF_THE_MODEL = ("eos_token_id", "decoder_start_token_id", "forced_bos_token_id", "suppress_tokens",
                 "begin_suppress_tokens")


def model_tokens(given: GenerationConfig, source: Any) -> dict[str, list[int]]:
    """Name -> token ids, of those that `given` has. Raises UserError, naming `source`, for what is no token id."""
    found = {}
    for name in _OF_THE_MODEL:
        value = getattr(given, name, None)
        if value is None:
            continue
        found[name] = value if isinstance(value, list) else [value]
        if not all(type(token) is int and token >= 0 for token in found[name]):
            raise UserError(f"{source}/generation_config.json: {name}={value!r} is no token id, nor a list of them; "
                            "give whole numbers of 0 and more, or leave it out")
    return found
