"""What is streamed of an answer is the answer, and its tokens are counted."""

import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from sparse_train.inference.streaming import Clock, Words
from sparse_train.tasks.decoding import cut_behind

_PIECES = ["</s>", *(f"<0x{byte:02X}>" for byte in (10, 0xE5, 0xA5, 0xBD)), "▁", "▁▁▁▁", "▁def", "▁f", "▁return", "x",
           ".", "stopper", "\n", "好"]


def _sentence_piece():
    """As Llama 2's: a text's first space is dropped, rare characters are bytes."""
    tokenizer = Tokenizer(models.BPE({piece: place for place, piece in enumerate(_PIECES)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def _streamed(tokenizer, ids, stop=()):
    told = []
    words = Words(tokenizer, told.append, stop)
    words.put(torch.tensor([[1, 2, 3]]))  # the prompt
    for token in ids:
        words.put(torch.tensor([token]))
    before = "".join(told)
    words.end()
    return before, "".join(told)


@pytest.mark.parametrize("pieces, before, answer", [
    (["▁def", "▁f", "\n", "▁▁▁▁", "▁return", "x"], "def f", "def f\n     returnx"),
    (["▁def", "\n", "▁f", "▁"], "def\n f", "def\n f "),
    (["▁def", "▁", "<0xE5>", "<0xA5>", "<0xBD>", "▁f"], "def 好", "def 好 f"),
    (["▁def", "▁", "<0xE5>", "<0xA5>"], "def", "def \ufffd\ufffd"),
    (["好"] * 20, "好" * 4, "好" * 20),
    (["▁def", "▁f", "</s>"], "def", "def f"),
    (["▁def", "▁f", "stopper"], "def", "def fstop"),
])
def test_what_is_streamed_is_the_answer(pieces, before, answer):
    tokenizer, stop = _sentence_piece(), ["stop"]
    ids = [_PIECES.index(piece) for piece in pieces]
    assert cut_behind(tokenizer.decode(ids, skip_special_tokens=True), stop) == answer
    assert _streamed(tokenizer, ids, stop) == (before, answer + "\n")


def test_any_tokens_are_streamed_as_they_are_decoded():
    tokenizer, draw = _sentence_piece(), random.Random(0)
    for _ in range(200):
        ids = draw.choices([place for place, piece in enumerate(_PIECES) if not piece.startswith("<0x")], k=30)
        assert _streamed(tokenizer, ids)[1] == tokenizer.decode(ids, skip_special_tokens=True) + "\n"


@pytest.mark.parametrize("padding, num_tokens, num_later", [(0, 6, 3), (1, 6, 3), (9, 6, 3)])
def test_tokens_are_counted_up_to_an_end_that_may_be_the_padding(padding, num_tokens, num_later):
    clock = Clock()
    clock.put(torch.tensor([[0, 3], [3, 3], [0, 3]]))
    for tokens in ([3, 0, 3], [4, padding, 1], [0, padding, padding]):
        clock.put(torch.tensor(tokens))
    assert (clock.num_tokens((0, 1), padding), clock.num_tokens((0, 1), padding, first=1)) == (num_tokens, num_later)
