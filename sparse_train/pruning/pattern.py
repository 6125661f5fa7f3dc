"""Which positions survive, given scores. `keep` is bool (R, C), True where a weight survives."""

from collections.abc import Callable

import torch

from sparse_train.pruning.layers import num_kept
from sparse_train.pruning.pruner import Layer


def keep_largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Exactly `count` True at the largest of `scores` (any shape); of equal ones the first in memory survive."""
    if not count:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = scores.flatten().nan_to_num(torch.inf, torch.inf, -torch.inf)
    least = flat.kthvalue(flat.numel() - count + 1).values  # several times faster than a sort
    keep = flat > least
    keep[(flat == least).nonzero().flatten()[:count - int(keep.sum())]] = True
    return keep.view(scores.shape)


def keep_largest_per_row(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Exactly `count` True at the largest of each row of `scores` (R, C), every row as many as the others.

    Where rows do not divide `count`, those whose next score is the largest keep one more. A negative score is never
    kept: a row with few others leaves its share to the rows that have more.
    """
    num_rows, num_columns = scores.shape
    available = (scores >= 0).sum(dim=1)
    # filled[k]: kept if each row keeps its k + 1 largest, as far as it has them.
    filled = (num_rows - available.bincount(minlength=num_columns).cumsum(0)[:num_columns]).cumsum(0)
    count = min(count, int(filled[-1]))
    level = int((filled <= count).sum())
    ordered, columns = scores.sort(dim=1, descending=True, stable=True)
    kept = available.clamp(max=level)
    if level < num_columns:
        following = ordered[:, level].masked_fill(available <= level, -torch.inf)
        kept[following.sort(descending=True, stable=True).indices[:count - int(kept.sum())]] += 1
    is_kept = torch.arange(num_columns, device=scores.device) < kept[:, None]
    return torch.zeros_like(is_kept).scatter_(1, columns, is_kept)


def keep_groups(scores: torch.Tensor, group: tuple[int, int]) -> torch.Tensor:
    """N largest of every M columns of `scores` (R, C)."""
    count, size = group
    order = scores.unflatten(1, (-1, size)).sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order[..., :count], True).flatten(1)


def lower_dropped(scores: torch.Tensor, earlier: torch.Tensor | None) -> torch.Tensor:
    """`scores` (>= 0), below all others where `earlier` keeps nothing."""
    return scores if earlier is None else torch.where(earlier, scores, -1.0)


def keep_best(scores: torch.Tensor, layer: Layer,
              keep_unstructured: Callable[[torch.Tensor, int], torch.Tensor] = keep_largest) -> torch.Tensor:
    """keep (R, C) of the largest `scores` (R, C), all >= 0, in the layer's pattern, nothing that an earlier level
    dropped."""
    scores = lower_dropped(scores, layer.earlier)
    if layer.spec.group:
        keep = keep_groups(scores, layer.spec.group)
    else:
        keep = keep_unstructured(scores, num_kept(scores.numel(), layer.spec.sparsity))
    return keep if layer.earlier is None else keep & layer.earlier
