"""Which positions survive, given scores. `keep` is bool (R, C), True where a weight survives."""

from collections.abc import Callable

import torch

from sparse_train import dist
from sparse_train.pruning.layers import num_kept
from sparse_train.pruning.pruner import Layer

_INT32, _HALVES = torch.iinfo(torch.int32), 1 << 16


def keep_largest(scores: torch.Tensor, count: int, over_ranks: bool = False) -> torch.Tensor:
    """Exactly `count` True at the largest of `scores` (any shape); of equal ones the first in memory survive.

    `over_ranks`: of the scores of all ranks, whose memory follows that of the ranks before. Collective.
    """
    if not count:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = scores.flatten().nan_to_num(torch.inf, torch.inf, -torch.inf)
    # kthvalue is several times faster than a sort.
    least = _least_kept(flat, count) if over_ranks else flat.kthvalue(flat.numel() - count + 1).values
    keep, ties = flat > least, (flat == least).nonzero().flatten()
    num_left = count - int(keep.sum())
    if over_ranks:
        num_kept_and_ties = dist.gather_objects((int(keep.sum()), len(ties)))
        num_left = count - sum(kept for kept, _ in num_kept_and_ties)
        num_left = max(0, num_left - sum(equal for _, equal in num_kept_and_ties[:dist.rank()]))
    keep[ties[:num_left]] = True
    return keep.view(scores.shape)


def _least_kept(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The smallest of the `count` largest fp32 numbers of all ranks. All that is exchanged is how many have which upper
    half of their bits, and of those with the one that is sought, how many have which lower half."""
    bits = scores.view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ _INT32.max, bits)  # integers in the order of the numbers
    upper = (ordered >> 16) + _HALVES // 2
    high, num_left = _digit(upper, count)
    low, _ = _digit(ordered[upper == high] & (_HALVES - 1), num_left)
    found = (high - _HALVES // 2) << 16 | low
    return torch.tensor(found if found >= 0 else found ^ _INT32.max, dtype=torch.int32).view(torch.float32)


def _digit(digits: torch.Tensor, count: int) -> tuple[int, int]:
    """(the smallest of the `count` largest `digits` of all ranks, how many of the `count` are equal to it)."""
    at_least = dist.sum_over_ranks(digits.bincount(minlength=_HALVES)).flip(0).cumsum(0)
    place = int((at_least < count).sum())
    return _HALVES - 1 - place, count - int(at_least[place - 1] if place else 0)


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
        count = num_kept(layer.num_weights, layer.spec.sparsity)
        keep = keep_largest(scores, count, True) if layer.num_rows else keep_unstructured(scores, count)
    return keep if layer.earlier is None else keep & layer.earlier
