"""The examples of each micro-step, as a pure function of (seed, step), so that resuming needs no state.

Epoch e is a permutation of the examples drawn from (seed, e). Step s reads positions s * batch ... of the concatenated
epochs; an endless task is read in order. The ranks divide a micro-step's examples into contiguous parts.

Other examples that are mixed in have epochs of their own. Of the first n positions floor(share * n) are theirs, evenly
spread, so every step has its share of them to within one example.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import torch

from sparse_train import dist


@dataclass(frozen=True)
class Mix:
    """Other examples among a task's own."""

    share: Fraction
    """Of the positions."""
    num_examples: int | None
    """None: endless."""

    def num_read(self, num_positions: int) -> int:
        """How many of the first `num_positions` are theirs."""
        return int(self.share * num_positions)


class Order:
    """The order in which training reads its examples."""

    def __init__(self, num_examples: int | None, batch_size: int, accumulation: int, seed: int, num_sharing: int = 1,
                 mix: Mix | None = None):
        """`num_examples` None: endless, every example is read once. `num_sharing` consecutive ranks get the same."""
        self._num_examples, self._seed, self._num_sharing, self._mix = num_examples, seed, num_sharing, mix
        self._micro_size, self._accumulation = batch_size // accumulation, accumulation

    def indices(self, step: int, micro_step: int) -> list[int]:
        """This rank's examples of a micro-step, counted from 0; may be empty. ~i is example i of those mixed in."""
        start = (step * self._accumulation + micro_step) * self._micro_size
        positions = range(start, start + self._micro_size)
        return dist.share([self._example(position) for position in positions], self._num_sharing)

    def _example(self, position: int) -> int:
        if self._mix is None:
            return _shuffled(position, self._num_examples, self._seed)
        before = self._mix.num_read(position)
        if self._mix.num_read(position + 1) > before:
            return ~_shuffled(before, self._mix.num_examples, self._seed)
        return _shuffled(position - before, self._num_examples, self._seed)


def _shuffled(position: int, num_examples: int | None, seed: int) -> int:
    """The example at a position of the concatenated epochs."""
    if num_examples is None:
        return position
    epoch, index = divmod(position, num_examples)
    return _permutation(num_examples, seed, epoch)[index]


@lru_cache(maxsize=4)  # a step may straddle two epochs, of the task's examples and of those mixed in
def _permutation(num_examples: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(num_examples, generator=generator).tolist()
