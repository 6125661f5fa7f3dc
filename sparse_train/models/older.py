"""Make a folder that transformers 5 wrote readable by transformers 4. Version 5 reads the result as before."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedModel

from sparse_train.artifacts import write_json

_FAST = "TokenizersBackend"
# Model type -> version 4's name for the theta of layers with sliding attention.
_LOCAL = {"gemma3_text": "rope_local_base_freq", "gemma3n_text": "rope_local_base_freq", "olmo3": "rope_theta",
          "modernbert-decoder": "local_rope_theta"}
# Model type -> version 4's names for the theta and for the share of the dimensions that rotate.
_ROTARY = {"gpt_neox": ("rotary_emb_base", "rotary_pct")}
# Model types whose decoder's output is never scaled.
_UNSCALED = ("mt5",)
Named = tuple[str, torch.Tensor]


def add_older_keys(folder: Path) -> None:
    """Rewrite config.json and tokenizer_config.json of `folder` so that transformers 4.57 reads them too."""
    config = folder / "config.json"
    write_json(config, _with_older_names(json.loads(config.read_text(encoding="utf-8"))))
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.is_file():
        keys = json.loads(tokenizer.read_text(encoding="utf-8"))
        if keys.get("tokenizer_class") == _FAST:
            keys["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(keys.get("extra_special_tokens"), list):
            keys["additional_special_tokens"] = keys.pop("extra_special_tokens")
        write_json(tokenizer, keys)


def with_head(model: PreTrainedModel, tensors: Iterable[Named]) -> Iterator[Named]:
    """`tensors`, with the head twice where version 4 would not tie it: see `_is_unscaled`."""
    heads = model.all_tied_weights_keys if _is_unscaled(model.config.to_dict()) else {}
    source = heads.get("lm_head.weight")
    for name, tensor in tensors:
        yield name, tensor
        if name == source:
            yield "lm_head.weight", tensor.detach().clone()


def _is_unscaled(config: dict[str, Any]) -> bool:
    """T5 1.1 and mT5: version 4 scales the decoder's output wherever the head is tied; in version 5 these are two keys.
    """
    return config.get("model_type") in _UNSCALED or config.get("scale_decoder_outputs", True) is False


def _with_older_names(config: dict[str, Any]) -> dict[str, Any]:
    keys = _with_rope({key: _with_older_names(value) if isinstance(value, dict) and "model_type" in value else value
                       for key, value in config.items()})
    model_type = config.get("model_type", "")
    if model_type in CONFIG_MAPPING:
        for older, newer in CONFIG_MAPPING[model_type].attribute_map.items():
            if older == "num_experts" and newer in keys:
                keys.setdefault(older, keys[newer])
    if _is_unscaled(config):
        keys["tie_word_embeddings"] = False
    return keys


def _with_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Version 4 does not know `rope_parameters`, and computes with its default theta."""
    keys = dict(config)
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return keys
    if "rope_theta" not in rope:  # an entry per kind of layer, which version 4 knows of the types in _LOCAL
        local = _LOCAL.get(config.get("model_type", ""))
        if local is None or set(rope) != {"full_attention", "sliding_attention"}:
            return keys
        keys[local] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
        if local == "local_rope_theta":
            keys["global_rope_theta"] = rope["rope_theta"]
    keys |= {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    if names := _ROTARY.get(config.get("model_type", "")):
        keys |= dict(zip(names, (rope["rope_theta"], rope.get("partial_rotary_factor", 1.0)), strict=True))
    if rope.get("rope_type", "default") != "default":
        keys["rope_scaling"] = {key: value for key, value in rope.items()
                                if key not in ("rope_theta", "partial_rotary_factor")}
    return keys
