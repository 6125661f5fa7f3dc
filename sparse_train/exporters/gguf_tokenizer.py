"""A tokenizer as llama.cpp reads it: BPE on bytes ("gpt2" there) or on characters ("llama", as of SentencePiece)."""

import json
from typing import TYPE_CHECKING, Any

from sparse_train.compat.transformers import gguf_text_splits
from sparse_train.errors import UserError
from sparse_train.exporters.source import Source

if TYPE_CHECKING:  # an extra
    from gguf import GGUFWriter

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""What SentencePiece writes for a space."""
_IGNORES_MERGES = "llama-bpe"
"""Of the names for Llama 3's split the one with which a word that is a token is not merged from parts."""


def add_tokenizer(writer: "GGUFWriter", source: Source) -> None:
    """Raises UserError for a tokenizer of which llama.cpp would make other tokens."""
    tokenizer = source.processor.tokenizer
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    steps = _flat(parts["pre_tokenizer"], "pretokenizers")
    if parts["model"]["type"] != "BPE":
        raise UserError(f"{source.folder}: its tokenizer is {parts['model']['type']}, which is not written as GGUF; "
                        "give a model with a BPE one")
    if any(step["type"] == "ByteLevel" for step in steps):
        _add_byte_level(writer, source, parts, steps)
    else:
        _add_characters(writer, source, parts, steps)
    added = {token: each.special for token, each in tokenizer.added_tokens_decoder.items()}
    names = {token: name for name, token in tokenizer.get_vocab().items()}
    size = source.model.config.vocab_size
    writer.add_vocab_size(size)
    writer.add_token_list([names.get(token, f"[PAD{token}]") for token in range(size)])
    writer.add_token_types([_type(token, names, added, tokenizer, parts["model"]) for token in range(size)])
    for add, special in ((writer.add_bos_token_id, tokenizer.bos_token_id),
                         (writer.add_eos_token_id, tokenizer.eos_token_id),
                         (writer.add_unk_token_id, tokenizer.unk_token_id),
                         (writer.add_pad_token_id, tokenizer.pad_token_id)):
        if special is not None:
            add(special)
    ends = source.model.generation_config.eos_token_id
    if isinstance(ends, list) and (others := [end for end in ends if end != tokenizer.eos_token_id]):
        writer.add_eot_token_id(others[0])
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _flat(step: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """A pre-tokenizer or normalizer of tokenizer.json as a list of steps."""
    if step is None:
        return []
    return step[inner] if step["type"] == "Sequence" else [step]


def _add_byte_level(writer: "GGUFWriter", source: Source, parts: dict[str, Any], steps: list[dict[str, Any]]) -> None:
    split = _split_name(steps, parts["model"]["ignore_merges"])
    if split is None:
        raise UserError(f"{source.folder}: its tokenizer splits text in a way that llama.cpp has no name for "
                        f"({', '.join(step['type'] for step in steps)}), so it is not written as GGUF")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_merges([" ".join(merge) for merge in parts["model"]["merges"]])


def _split_name(steps: list[dict[str, Any]], ignores_merges: bool) -> str | None:
    *before, last = steps
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if last["use_regex"]:
        if before and not (len(before) == 1 and before[0]["type"] == "Digits" and before[0]["individual_digits"]):
            return None
        return "smollm" if before else "gpt-2"
    if len(before) != 1 or before[0]["type"] != "Split" or before[0]["behavior"] != "Isolated":
        return None
    names = [name for name, split in gguf_text_splits().items() if split == before[0]["pattern"].get("Regex")]
    if _IGNORES_MERGES in names:
        return _IGNORES_MERGES if ignores_merges else "dbrx"
    return names[0] if names else None


def _add_characters(writer: "GGUFWriter", source: Source, parts: dict[str, Any], steps: list[dict[str, Any]]) -> None:
    """Tokens have scores in place of merges; those of SentencePiece are in the order of the merges that make them."""
    normalizers = [step["type"] for step in _flat(parts["normalizer"], "normalizers")]
    metaspace = [step for step in steps if step["type"] == "Metaspace"]
    if not parts["model"]["byte_fallback"] or len(metaspace) != len(steps) or not {"Prepend", "Replace"}.issuperset(
            normalizers):
        raise UserError(f"{source.folder}: its tokenizer is BPE neither on bytes nor as SentencePiece's, which is not "
                        "written as GGUF")
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(parts["model"]["merges"]):
        ranks.setdefault(left + right, rank)
    names = {token: name for name, token in parts["model"]["vocab"].items()}
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores([-float(ranks.get(names.get(token, ""), 0))
                             for token in range(source.model.config.vocab_size)])
    adds_space = "Prepend" in normalizers or any(step["prepend_scheme"] != "never" for step in metaspace)
    writer.add_add_space_prefix(adds_space)


def _type(token: int, names: dict[int, str], added: dict[int, bool], tokenizer: Any, model: dict[str, Any]) -> int:
    from gguf import TokenType

    if token not in names:
        return TokenType.UNUSED
    if token == tokenizer.unk_token_id and not added.get(token):
        return TokenType.UNKNOWN
    if token in added:
        return TokenType.CONTROL if added[token] else TokenType.USER_DEFINED
    if model["byte_fallback"] and names[token].startswith("<0x") and len(names[token]) == 6:
        return TokenType.BYTE
    return TokenType.NORMAL
