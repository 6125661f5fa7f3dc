"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774): layer-wise optimal-brain-surgeon pruning in column blocks.

    H = 2 / n * sum of x x^T over real tokens      U upper triangular with H^-1 = U^T U
    score of w_ij = w_ij^2 / U_jj^2; the lowest go; what a pruned weight contributed moves to the columns to its right

Letters: R rows (outputs), C columns (inputs). Deviations from the authors' code: n counts tokens, padding is left out,
counts are exact over the layer, and a Cholesky factorisation that fails is repeated with more damping.
"""

import itertools
import logging

import torch

from sparse_train.config import PruneConfig
from sparse_train.errors import UserError
from sparse_train.pruning.layers import num_kept
from sparse_train.pruning.pattern import keep_groups, keep_largest, lower_dropped
from sparse_train.pruning.pruner import Layer, Pruner
from sparse_train.pruning.statistics import Hessian

log = logging.getLogger(__name__)
_CHOLESKY_ATTEMPTS = 5


class SparseGPT(Pruner[Hessian]):
    Statistics = Hessian

    def prune(self, layer: Layer, statistics: Hessian) -> tuple[torch.Tensor, torch.Tensor]:
        """The updated weight is fp32. What an earlier level dropped stays dropped, though updates write there before a
        block's turn comes. Raises UserError, naming the layer, when the Hessian stays singular."""
        layer.require_finite(statistics)
        weight, hessian = layer.weight.detach().float().clone(), statistics.mean()
        dead = hessian.diagonal() == 0
        hessian.diagonal()[dead] = 1
        weight[:, dead] = 0
        upper = _inverse_factor(hessian, layer.spec.damping, layer.name)
        keep = torch.zeros_like(weight, dtype=torch.bool)
        num_rows, num_columns = weight.shape
        width = _block_width(layer.spec)
        starts = range(0, num_columns, width)
        budgets = _budgets(num_rows, [*starts, num_columns], layer.spec.sparsity, layer.earlier)
        for start, budget in zip(starts, budgets, strict=True):
            stop = min(start + width, num_columns)
            errors = _prune_block(weight, keep, upper, start, stop, budget, layer)
            weight[:, stop:] -= errors @ upper[start:stop, stop:]
        return weight, keep


def _block_width(spec: PruneConfig) -> int:
    """Whole groups of an N:M pattern per block."""
    if spec.group is None:
        return spec.block_size
    size = spec.group[1]
    return max(size, spec.block_size // size * size)


def _budgets(num_rows: int, edges: list[int], sparsity: float, earlier: torch.Tensor | None) -> list[int]:
    """Weights kept per block of columns edges[i]..edges[i + 1] - 1: its share, as far as `earlier` left as many; what
    one block lacks goes to those that have more."""
    blocks = list(itertools.pairwise(edges))
    shares = [num_kept(num_rows * stop, sparsity) - num_kept(num_rows * start, sparsity) for start, stop in blocks]
    if earlier is None:
        return shares
    num_alive = [int(earlier[:, start:stop].sum()) for start, stop in blocks]
    budgets = [min(share, alive) for share, alive in zip(shares, num_alive, strict=True)]
    num_lacking = sum(shares) - sum(budgets)
    for index, alive in enumerate(num_alive):
        more = min(num_lacking, alive - budgets[index])
        budgets[index] += more
        num_lacking -= more
    return budgets


def _prune_block(weight: torch.Tensor, keep: torch.Tensor, upper: torch.Tensor, start: int, stop: int, budget: int,
                 layer: Layer) -> torch.Tensor:
    """Prune columns start..stop-1 in place, one after the other; returns the scaled errors (R, stop - start)."""
    diagonal, earlier, group = upper.diagonal(), layer.earlier, layer.spec.group

    def scores(part: slice) -> torch.Tensor:
        return lower_dropped(weight[:, part].square() / diagonal[part].square(),
                             None if earlier is None else earlier[:, part])

    if group is None:
        keep[:, start:stop] = keep_largest(scores(slice(start, stop)), budget)
    errors = torch.zeros_like(weight[:, start:stop])
    for column in range(start, stop):
        if group and (column - start) % group[1] == 0:
            ahead = slice(column, column + group[1])  # scores see the updates of the columns before
            keep[:, ahead] = keep_groups(scores(ahead), group)
            if earlier is not None:
                keep[:, ahead] &= earlier[:, ahead]
        before = weight[:, column].clone()
        weight[:, column] *= keep[:, column]
        error = (before - weight[:, column]) / diagonal[column]
        weight[:, column + 1:stop] -= torch.outer(error, upper[column, column + 1:stop])
        errors[:, column - start] = error
    return errors


def _inverse_factor(hessian: torch.Tensor, damping: float, name: str) -> torch.Tensor:
    """Upper triangular U (C, C) with H^-1 = U^T U, for the damped H."""
    mean = hessian.diagonal().mean()
    for attempt in range(_CHOLESKY_ATTEMPTS):
        damped = hessian + torch.diag(torch.full_like(hessian.diagonal(), damping * 10**attempt) * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        log.warning("%s: Cholesky failed with damping %g; trying ten times as much", name, damping * 10**attempt)
    raise UserError(f"{name}: its Hessian is singular even with damping {damping * 10**(_CHOLESKY_ATTEMPTS - 1):g}; "
                    "raise prune.num_calibration or prune.damping, or use prune.method=magnitude")
