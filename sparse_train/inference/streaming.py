"""What is told of each token while an answer is generated: its text, as soon as it is whole words, and when it came."""

import re
import time
from collections.abc import Callable, Collection, Sequence

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from sparse_train.tasks.decoding import cut_behind

_HELD = re.compile(r"\s*\S{0,16}\Z")
"""The end of a text that the next token may change: its last word, and the space in front of it."""


class Clock(BaseStreamer):
    """When the tokens of a batch of answers came; `inner` is told of them as well."""

    def __init__(self, inner: BaseStreamer | None = None):
        self._inner = inner
        self._start = time.perf_counter()
        self._seconds: list[float] = []  # of the prompt, then of each step
        self._tokens: list[torch.Tensor] = []

    def put(self, value: torch.Tensor) -> None:
        self._seconds.append(time.perf_counter() - self._start)
        self._tokens.append(value)
        if self._inner is not None:
            self._inner.put(value)

    def end(self) -> None:
        if self._inner is not None:
            self._inner.end()

    @property
    def first_seconds(self) -> float:
        """Until the first new token, which is most of all the prompt's forward pass."""
        return self._seconds[1]

    @property
    def later_seconds(self) -> float:
        """From the first to the last."""
        return self._seconds[-1] - self._seconds[1]

    def num_tokens(self, ends: Collection[int], padding: int, first: int = 0) -> int:
        """New ones from each answer's `first` on, up to and with the first of `ends`, without the padding behind it,
        which may be one of them."""
        tokens = torch.stack(self._tokens[1:], dim=1)
        is_end = torch.isin(tokens, torch.tensor(sorted(ends)))
        is_behind = is_end.cumsum(1) > is_end
        return int((~is_behind & (is_end | (tokens != padding)))[:, first:].sum())


class Words(BaseStreamer):
    """Gives `write` the text of one answer, whole words at a time (of a longer one than 16 characters, its beginning),
    and then a newline.

    Every token has all new ones decoded: what it reads as depends on those in front of it, and SentencePiece drops the
    space in front of the first.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None], stop: Sequence[str] = ()):
        self._tokenizer, self._write, self._stop = tokenizer, write, stop
        self._tokens: list[int] | None = None
        self._num_written = 0

    def put(self, value: torch.Tensor) -> None:
        if self._tokens is None:  # the prompt
            self._tokens = []
            return
        self._tokens += value.tolist()
        text = self._text().rstrip("\ufffd")  # of a character whose last bytes are still to come
        self._write_to(text, next(_HELD.finditer(text, self._num_written)).start())

    def end(self) -> None:
        text = self._text()
        self._write_to(text, len(text))
        self._write("\n")

    def _text(self) -> str:
        return cut_behind(str(self._tokenizer.decode(self._tokens or [], skip_special_tokens=True)), self._stop)

    def _write_to(self, text: str, end: int) -> None:
        if end > self._num_written:
            self._write(text[self._num_written:end])
            self._num_written = end
