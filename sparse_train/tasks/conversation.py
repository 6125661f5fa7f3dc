"""Conversations as token ids, written by the chat template of the model's tokenizer.

A template is a Jinja program from outside; transformers runs it in a sandbox. It writes every special token itself, so
the tokenizer adds none.
"""

import functools
import re
from collections.abc import Sequence
from typing import Any

from sparse_train.errors import UserError, first_line
from sparse_train.tasks import read

Message = tuple[str, str]
"""(role, content)."""
ASSISTANT = "assistant"
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")  # those that transformers looks for


class Unwritable(UserError):
    """A conversation that the template refuses, or whose answers cannot be found in what it writes."""


def prompt_ids(tokenizer, messages: Sequence[Message]) -> list[int]:
    """Of `messages` and the start of the assistant's turn."""
    return _ids(tokenizer, _write(tokenizer, messages, tokenize=False, add_generation_prompt=True))


def labelled_ids(tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    """(token ids, whether each is of an assistant's turn: of its content or the token that ends it).

    Where the template marks these by {% generation %}, as it says. Otherwise a turn is what follows the messages before
    it, written with the start of the assistant's turn; such a template must write each message alike whatever follows.
    Raises Unwritable.
    """
    if _MARKS.search(_template(tokenizer)):
        marked = _write(tokenizer, messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, is_answer = marked["input_ids"], [bool(mark) for mark in marked["assistant_masks"]]
        answered, end = {token for token, mark in zip(ids, is_answer, strict=True) if mark}, end_of_turn(tokenizer)
        if not answered or (end is not None and end not in answered):
            raise _unwritable(messages, "its {% generation %} marks leave out what the assistant says or the "
                                        "token that ends its turn; mark both")
        return ids, is_answer
    if not tokenizer.is_fast:
        raise UserError(f"{tokenizer.name_or_path}: its tokenizer does not tell which characters a token stands for, "
                        "so the assistant's tokens cannot be found; give a folder with a tokenizer.json")
    text = _write(tokenizer, messages, tokenize=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, is_answer = encoded["input_ids"], [False] * len(encoded["input_ids"])
    for index, (role, _) in enumerate(messages):
        if role != ASSISTANT:
            continue
        before = _write(tokenizer, messages[:index], tokenize=False, add_generation_prompt=True)
        through = _write(tokenizer, messages[:index + 1], tokenize=False)  # may end with more, as Phi-3's
        end = next((i for i, pair in enumerate(zip(text, through, strict=False)) if len(set(pair)) == 2), len(through))
        turn = [i for i, (first, last) in enumerate(encoded["offset_mapping"]) if last > len(before) and first < end]
        ends = [i for i in turn if ids[i] == end_of_turn(tokenizer)]
        if not text.startswith(before) or not ends:
            raise _unwritable(messages, _why_unmarked(tokenizer))
        is_answer[turn[0]:ends[-1] + 1] = [True] * (ends[-1] + 1 - turn[0])
    return ids, is_answer


@functools.lru_cache(maxsize=4)
def end_of_turn(tokenizer) -> int | None:
    """The special token that the template writes behind an answer, None where it writes none."""
    text = _write(tokenizer, [("user", "Which city?"), (ASSISTANT, "Paris")], tokenize=False)
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    behind = _ids(tokenizer, text.rpartition("Paris")[2])
    return next((token for token in behind if token in special | {tokenizer.eos_token_id}), None)


def _why_unmarked(tokenizer) -> str:
    if end_of_turn(tokenizer) is None:
        return ("the template ends an assistant's turn without a special token, so a model would not learn to stop; "
                "let it write eos_token there")
    return ("the template writes a turn differently as a prompt, alone or when other turns follow; mark what the "
            "assistant says in it by {% generation %} and {% endgeneration %}")


def _write(tokenizer, messages: Sequence[Message], **options: Any) -> Any:
    _template(tokenizer)
    try:
        written = tokenizer.apply_chat_template([{"role": role, "content": content} for role, content in messages],
                                                **options)
    except Exception as error:  # it may raise anything, also by raise_exception
        raise _unwritable(messages, first_line(error)) from error
    if isinstance(written, str) and not read.is_unicode(written):
        raise _unwritable(messages, "it writes half of a surrogate pair, which is no character")
    return written


def _template(tokenizer) -> str:
    if tokenizer.chat_template is None:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path or 'a new model'} has no chat template, which says "
                        "how a conversation is written; leave chat out, or give a model with a template")
    return tokenizer.get_chat_template()


def _unwritable(messages: Sequence[Message], why: str) -> Unwritable:
    return Unwritable(f"the chat template cannot write {messages[-1][1][:40]!r}: {why}")


def _ids(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)
