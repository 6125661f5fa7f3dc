"""What transformers 4 needs in a folder that transformers 5 wrote. Version 5 reads both ways of saying it the same."""

import json
from pathlib import Path
from typing import Any

from sparse_train.artifacts import write_json

_FAST = "TokenizersBackend"
_LOCAL = {"gemma3_text": "rope_local_base_freq", "gemma3n_text": "rope_local_base_freq",
          "modernbert-decoder": "local_rope_theta"}


def add_older_keys(folder: Path) -> None:
    """Rewrite config.json and tokenizer_config.json of `folder` so that transformers 4.57 reads them too."""
    config = folder / "config.json"
    write_json(config, _with_rope(json.loads(config.read_text(encoding="utf-8"))))
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.is_file():
        given = json.loads(tokenizer.read_text(encoding="utf-8"))
        if given.get("tokenizer_class") == _FAST:
            given["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(given.get("extra_special_tokens"), list):
            given["additional_special_tokens"] = given.pop("extra_special_tokens")
        write_json(tokenizer, given)


def _with_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Version 4 does not know `rope_parameters`, and computes with its default theta."""
    made = {key: _with_rope(value) if isinstance(value, dict) and "model_type" in value else value
            for key, value in config.items()}
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return made
    if "rope_theta" not in rope:  # an entry per kind of layer; of the types that have that, version 4 knows these
        local = _LOCAL.get(config.get("model_type", ""))
        if local is None or set(rope) != {"full_attention", "sliding_attention"}:
            return made
        made[local] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
        made |= {"global_rope_theta": rope["rope_theta"]} if local == "local_rope_theta" else {}
    made |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    if config.get("model_type") == "gpt_neox":
        made |= {"rotary_emb_base": rope["rope_theta"], "rotary_pct": rope.get("partial_rotary_factor", 1.0)}
    if rope.get("rope_type", "default") != "default":
        made["rope_scaling"] = {key: value for key, value in rope.items()
                                if key not in ("rope_theta", "partial_rotary_factor")}
    return made
