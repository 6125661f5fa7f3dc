"""The examples of each micro-step, as a pure function of (seed, step), so that resuming needs no state.

Epoch e is a permutation of the examples drawn from (seed, e). Step s reads positions s * batch ... of the concatenated
epochs; an endless task is read in order. The ranks divide a micro-step's examples into contiguous parts.
"""

from functools import lru_cache

import torch

from sparse_train import dist


class Order:
    """The order in which training reads its examples."""

    def __init__(self, num_examples: int | None, batch_size: int, accumulation: int, seed: int, num_sharing: int = 1):
        """`num_examples` None: endless, every example is read once. `num_sharing` consecutive ranks get the same."""
        self._num_examples, self._seed, self._num_sharing = num_examples, seed, num_sharing
        self._micro_size, self._accumulation = batch_size // accumulation, accumulation

    def indices(self, step: int, micro_step: int) -> list[int]:
        """This rank's examples of a micro-step, counted from 0; may be empty."""
        start = (step * self._accumulation + micro_step) * self._micro_size
        positions = range(start, start + self._micro_size)
        return dist.share([self._example(position) for position in positions], self._num_sharing)

    def _example(self, position: int) -> int:
        if self._num_examples is None:
            return position
        epoch, index = divmod(position, self._num_examples)
        return _permutation(self._num_examples, self._seed, epoch)[index]


@lru_cache(maxsize=2)  # a step may straddle two epochs
def _permutation(num_examples: int, seed: int, epoch: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(num_examples, generator=generator).tolist()
