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
_NARROW = 16  # columns that are updated one by one


class SparseGPT(Pruner[Hessian]):
    Statistics = Hessian
    _factor: tuple[tuple[Hessian, int, float], torch.Tensor, torch.Tensor] | None = None
    """Of the layer before, which often has the same inputs: what it was made from, U, the dead columns."""

    def prune(self, layer: Layer, statistics: Hessian) -> tuple[torch.Tensor, torch.Tensor]:
        """The updated weight is fp32. What an earlier level dropped stays dropped, though updates write there before a
        block's turn comes. Raises UserError, naming the layer, when the Hessian stays singular."""
        layer.require_finite(statistics)
        source = (statistics, statistics.num_tokens, layer.spec.damping)
        if self._factor is None or self._factor[0] != source:
            hessian = statistics.mean()
            dead = hessian.diagonal() == 0
            hessian.diagonal()[dead] = 1
            self._factor = source, _inverse_factor(hessian, layer.spec.damping, layer.name), dead
        _, upper, dead = self._factor
        columns = layer.weight.detach().float().T.clone(memory_format=torch.contiguous_format)
        columns[dead] = 0
        keep = torch.zeros_like(columns, dtype=torch.bool)
        num_columns, num_rows = columns.shape
        width = _block_width(layer.spec)
        starts = range(0, num_columns, width)
        budgets = _budgets(num_rows, [*starts, num_columns], layer.spec.sparsity, layer.earlier)
        for start, budget in zip(starts, budgets, strict=True):
            stop = min(start + width, num_columns)
            if layer.spec.group is None:
                keep[start:stop] = keep_largest(_scores(columns, upper, slice(start, stop), layer), budget).T
            errors = torch.empty_like(columns[start:stop])
            _prune_columns(columns, keep, errors, upper, start, stop, layer)
            columns[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
        return columns.T.contiguous(), keep.T.contiguous()


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


def _scores(columns: torch.Tensor, upper: torch.Tensor, part: slice, layer: Layer) -> torch.Tensor:
    """(R, columns in `part`)."""
    scores = (columns[part].square() / upper.diagonal()[part, None].square()).T
    return lower_dropped(scores, None if layer.earlier is None else layer.earlier[:, part])


def _prune_columns(columns: torch.Tensor, keep: torch.Tensor, errors: torch.Tensor, upper: torch.Tensor, start: int,
                   stop: int, layer: Layer) -> None:
    """Prune `columns` (C, R) from start to stop - 1 in place, in order; their scaled errors go to `errors`.

    `columns`, `keep` and `errors` have a weight's columns as rows, so that each is contiguous. A half is finished
    before one product takes its errors to the other half: few columns are updated one by one.
    """
    group = layer.spec.group
    size = group[1] if group else 1
    half = (stop - start) // 2 // size * size
    if half and stop - start > _NARROW:
        middle = start + half
        _prune_columns(columns, keep, errors[:half], upper, start, middle, layer)
        columns[middle:stop].addmm_(upper[start:middle, middle:stop].T, errors[:half], alpha=-1)
        _prune_columns(columns, keep, errors[half:], upper, middle, stop, layer)
        return
    for column in range(start, stop):
        if group and (column - start) % size == 0:
            ahead = slice(column, column + size)  # scores see the updates of the columns before
            keep[ahead] = keep_groups(_scores(columns, upper, ahead, layer), group).T
            if layer.earlier is not None:
                keep[ahead] &= layer.earlier[:, ahead].T
        error = errors[column - start]
        torch.div(columns[column].masked_fill(keep[column], 0), upper[column, column], out=error)
        columns[column] *= keep[column]
        columns[column + 1:stop].addr_(upper[column, column + 1:stop], error, alpha=-1)


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
