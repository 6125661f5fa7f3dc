"""What a pruner may collect from the inputs of a linear with C columns, in fp32."""

import torch


class Hessian:
    """H (C, C) = 2 / n * sum of x x^T over n tokens."""

    def __init__(self, num_columns: int, device: torch.device):
        self.sum, self.num_tokens = torch.zeros(num_columns, num_columns, device=device), 0

    def add(self, inputs: torch.Tensor) -> None:
        """`inputs` (tokens, C): real tokens only."""
        inputs = inputs.float()
        self.sum.addmm_(inputs.T, inputs, alpha=2.0)
        self.num_tokens += len(inputs)

    def mean(self) -> torch.Tensor:
        return self.sum / self.num_tokens


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
