"""Endless, seeded examples: what every task that needs no data shares."""

import random
import sys
from collections.abc import Callable, Sequence

from sparse_train.tasks.batch import Example
from sparse_train.tasks.read import in_test

_TEST_SHARE = 26 / 256


class Generated(Sequence):
    """Example i of a split is a function of (seed, split, i). `draw(random) -> (text, example)`: the text decides the
    split, so no test example is ever a training one. `[:n]` are the first n of them."""

    def __init__(self, seed: str, split: str, draw: Callable[[random.Random], tuple[str, Example]],
                 length: int = sys.maxsize):
        self._seed, self._split, self._draw, self._length = seed, split, draw, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index):
        if isinstance(index, slice):
            if index.start or index.step:
                raise IndexError(index)
            return Generated(self._seed, self._split, self._draw, self._length if index.stop is None else index.stop)
        if not 0 <= index < self._length:
            raise IndexError(index)
        random_ = random.Random(f"{self._seed} {self._split} {index}")
        while True:
            text, example = self._draw(random_)
            if in_test(text, _TEST_SHARE) == (self._split == "test"):
                return example
