"""What a pruner may collect from the inputs of a linear with C columns, and of gradients (backward.py) of its weight.

Products are fp32, batch by batch, and sums of batches are fp64. A sum of fp32 numbers is exact in fp64 as long as none
is 2^29 times smaller than the result, so the order of the batches, and which rank had which, changes no bit.
"""

from collections.abc import Iterator

import torch

_TILE = 256  # rows of a piece of the lower triangle


class Hessian:
    """H (C, C) = 2 / n * sum of x x^T over n tokens."""

    def __init__(self, num_columns: int, device: torch.device):
        """`sum`: the lower triangle, one piece of rows behind the other; each piece ends at its last row's diagonal."""
        self._num_columns, self.num_tokens = num_columns, 0
        size = sum(rows * stop for rows, stop in self._pieces())
        self.sum = torch.zeros(size, dtype=torch.float64, device=device)

    def add(self, inputs: torch.Tensor) -> None:
        """`inputs` (tokens, C) of a batch: real tokens only."""
        inputs = inputs.float()
        for piece in self._rows():
            rows, stop = piece.shape
            piece += 2.0 * (inputs[:, stop - rows:stop].T @ inputs[:, :stop])
        self.num_tokens += len(inputs)

    def mean(self) -> torch.Tensor:
        """fp32."""
        mean = torch.empty(self._num_columns, self._num_columns, device=self.sum.device)
        for piece in self._rows():
            rows, stop = piece.shape
            start = stop - rows
            mean[start:stop, :stop] = piece / self.num_tokens
            square = mean[start:stop, start:stop].tril()
            mean[start:stop, start:stop] = square + square.tril(-1).T
            mean[:start, start:stop] = mean[start:stop, :start].T
        return mean

    def damped(self, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
        """(H plus `damping` times the mean of its diagonal on that diagonal, the columns (C,) that never fire). Of
        those the diagonal counts as 1, so the sum is positive definite."""
        hessian = self.mean()
        diagonal = hessian.diagonal()  # a view
        dead = diagonal == 0
        diagonal[dead] = 1
        diagonal += damping * diagonal.mean()
        return hessian, dead

    def norms(self) -> torch.Tensor:
        """Those of ColumnNorms, but for rounding."""
        return (self.mean().diagonal() * (self.num_tokens / 2)).sqrt()

    def _pieces(self) -> Iterator[tuple[int, int]]:
        """(number of rows, the column after their last)."""
        for start in range(0, self._num_columns, _TILE):
            stop = min(start + _TILE, self._num_columns)
            yield stop - start, stop

    def _rows(self) -> Iterator[torch.Tensor]:
        start = 0
        for rows, stop in self._pieces():
            yield self.sum[start:start + rows * stop].view(rows, stop)
            start += rows * stop


class Gradients:
    """Of the weight of a linear with R rows, one per example of this rank: E examples of a batch, T tokens."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
        """(inputs (E, T, C), gradient of the loss by the outputs (E, T, R)) of each time that the linear ran on a
        batch. The gradient is 0 at padding."""

    def of_rows(self, rows: slice) -> Iterator[torch.Tensor]:
        """The gradients of some rows of the weight (E, rows, C), fp32, batch by batch."""
        for calls in self.batches:
            if calls:
                yield torch.stack([outputs[..., rows].mT.float() @ inputs.float() for inputs, outputs in calls]).sum(0)


class ColumnNorms:
    """The 2-norm (C,) of each column of the inputs."""

    def __init__(self, num_columns: int, device: torch.device):
        self.sum, self.num_tokens = torch.zeros(num_columns, dtype=torch.float64, device=device), 0

    def add(self, inputs: torch.Tensor) -> None:
        """`inputs` (tokens, C) of a batch: real tokens only."""
        self.sum += inputs.float().square().sum(dim=0)
        self.num_tokens += len(inputs)

    def norms(self) -> torch.Tensor:
        """fp32."""
        return self.sum.sqrt().float()
