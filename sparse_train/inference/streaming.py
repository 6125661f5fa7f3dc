"""What is told of each token while an answer is generated: its text, as soon as it is whole words, and when it came."""

import time
from collections.abc import Callable

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer
from transformers.generation import BaseStreamer


class Clock(BaseStreamer):
    """When the tokens of a batch of answers came; `inner` is told of them as well."""

    def __init__(self, padding: int, inner: BaseStreamer | None = None):
        self._padding, self._inner = padding, inner
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
    def num_tokens(self) -> int:
        """New ones, without padding."""
        return self._count(1)

    @property
    def num_later(self) -> int:
        """Without the first of each answer."""
        return self._count(2)

    @property
    def later_seconds(self) -> float:
        """From the first to the last."""
        return self._seconds[-1] - self._seconds[1]

    def _count(self, start: int) -> int:
        return sum(int((tokens != self._padding).sum()) for tokens in self._tokens[start:])


class Words(TextStreamer):
    """Gives `write` the text of one answer, whole words at a time."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._write(text + "\n" * stream_end)
