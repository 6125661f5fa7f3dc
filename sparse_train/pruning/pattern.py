"""Patterns: which positions survive, given scores. `keep` is bool (R, C), True where a weight survives."""

from collections.abc import Mapping

import torch

from sparse_train.config import PruneConfig
from sparse_train.errors import UserError


def check_pattern(shapes: Mapping[str, tuple[int, int]], spec: PruneConfig) -> None:
    """`shapes`: (R, C) by name. Raises UserError where N:M does not divide a width, or nothing of a weight would be
    kept: ZeRO-3 cannot partition a parameter without entries."""
    for name, (num_rows, num_columns) in shapes.items():
        if spec.group and num_columns % spec.group[1]:
            raise UserError(f"pattern {spec.pattern} does not divide {name}, which is {num_columns} wide; choose an M "
                            f"that divides {num_columns}, or prune.pattern=unstructured with prune.sparsity")
        if not spec.group and not num_kept(num_rows * num_columns, spec.sparsity):
            raise UserError(f"prune.sparsity={spec.sparsity} keeps none of the {num_rows} x {num_columns} weights of "
                            f"{name}, and a sparse layer needs at least one; choose a lower sparsity")


def num_kept(num_weights: int, sparsity: float) -> int:
    return round((1 - sparsity) * num_weights)


def dead_last(scores: torch.Tensor, earlier: torch.Tensor | None) -> torch.Tensor:
    """`scores` (>= 0), below all others where `earlier` keeps nothing."""
    return scores if earlier is None else torch.where(earlier, scores, -1.0)


def keep_largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Exactly `count` True at the largest of `scores` (any shape); of equal ones the first in memory survive."""
    order = scores.flatten().sort(descending=True, stable=True).indices
    keep = torch.zeros_like(scores, dtype=torch.bool).flatten()
    keep[order[:count]] = True
    return keep.view(scores.shape)


def keep_groups(scores: torch.Tensor, group: tuple[int, int]) -> torch.Tensor:
    """N largest of every M columns of `scores` (R, C)."""
    count, size = group
    order = scores.unflatten(1, (-1, size)).sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order[..., :count], True).flatten(1)


def magnitude(weight: torch.Tensor, spec: PruneConfig, earlier: torch.Tensor | None = None) -> torch.Tensor:
    """keep (R, C) of the largest |w|, uniform over the layer; nothing comes back that `earlier` (R, C) dropped."""
    scores = dead_last(weight.abs().float(), earlier)
    if spec.group:
        keep = keep_groups(scores, spec.group)
    else:
        keep = keep_largest(scores, num_kept(weight.numel(), spec.sparsity))
    return keep if earlier is None else keep & earlier
