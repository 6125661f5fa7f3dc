"""Packing: short examples share windows of at most so many tokens, so that hardly any padding is computed.

Positions start at 0 in each example, and no example attends to another (Family.separate_examples), so each one's logits
are those that it has in a row of its own. Which examples share a window is decided once, from their lengths and a seed.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from sparse_train.models import Processor
from sparse_train.tasks.batch import Batch, Example, decoder_batch, decoder_row


class Windows(Sequence[list[Example]]):
    """The examples of each window."""

    def __init__(self, examples: Sequence[Example], processor: Processor, size: int, seed: int):
        """`size`: tokens per window; no example is longer."""
        lengths = [len(decoder_row(example, processor)[0]) for example in examples]
        self._examples, self._windows = examples, best_fit(lengths, size, seed)
        self.filled = sum(lengths) / (size * len(self._windows))
        """The share of the windows' tokens that is no padding."""

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index):
        return [self._examples[i] for i in self._windows[index]]


def best_fit(lengths: Sequence[int], size: int, seed: int) -> list[list[int]]:
    """Windows of indices into `lengths`: in an order drawn from `seed`, each goes into the fullest window with room for
    it."""
    windows: list[list[int]] = []
    by_room: list[list[list[int]]] = [[] for _ in range(size + 1)]
    """Windows by the number of tokens that they have room for."""
    for index in torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist():
        length = lengths[index]
        room = next((room for room in range(length, size) if by_room[room]), size)
        if room == size:
            windows.append([])
        window = windows[-1] if room == size else by_room[room].pop()
        window.append(index)
        by_room[room - length].append(window)
    return windows


def collate_windows(windows: Sequence[Sequence[Example]], processor: Processor) -> Batch:
    """A row per window, padded on the right to the longest; of no windows one row of padding."""
    packed = [[decoder_row(example, processor) for example in window] for window in windows]
    batch = decoder_batch([(_joined(ids for ids, _ in rows), _joined(labels for _, labels in rows)) for rows in packed],
                          processor)
    positions = torch.zeros_like(batch.input_ids)  # also at padding, each token of which is an example of its own
    for index, rows in enumerate(packed):
        starts = _joined(range(len(ids)) for ids, _ in rows)
        positions[index, :len(starts)] = torch.tensor(starts)
    return replace(batch, positions=positions)


def _joined(parts: Iterable[Iterable[int]]) -> list[int]:
    return [*itertools.chain.from_iterable(parts)]
