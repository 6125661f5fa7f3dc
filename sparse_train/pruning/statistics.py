"""What a pruner may collect from the inputs of a linear with C columns, in fp32."""

import torch

_TILE = 256  # columns of a product that makes a part of the lower triangle


class Hessian:
    """H (C, C) = 2 / n * sum of x x^T over n tokens."""

    def __init__(self, num_columns: int, device: torch.device):
        """`sum` is filled up to the diagonal, and beyond it where tiles stand out."""
        self.sum, self.num_tokens = torch.zeros(num_columns, num_columns, device=device), 0

    def add(self, inputs: torch.Tensor) -> None:
        """`inputs` (tokens, C): real tokens only."""
        inputs = inputs.float()
        for start in range(0, inputs.shape[1], _TILE):
            stop = start + _TILE
            self.sum[start:stop, :stop].addmm_(inputs[:, start:stop].T, inputs[:, :stop], alpha=2.0)
        self.num_tokens += len(inputs)

    def mean(self) -> torch.Tensor:
        lower = self.sum.tril() / self.num_tokens
        return lower + lower.tril(-1).T

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
        """Those of ColumnNorms."""
        return (self.mean().diagonal() * (self.num_tokens / 2)).sqrt()


class ColumnNorms:
    """The 2-norm (C,) of each column of the inputs."""

    def __init__(self, num_columns: int, device: torch.device):
        self.sum, self.num_tokens = torch.zeros(num_columns, device=device), 0

    def add(self, inputs: torch.Tensor) -> None:
        """`inputs` (tokens, C): real tokens only."""
        self.sum += inputs.float().square().sum(dim=0)
        self.num_tokens += len(inputs)

    def norms(self) -> torch.Tensor:
        return self.sum.sqrt()
