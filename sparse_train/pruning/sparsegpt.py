"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774): layer-wise optimal-brain-surgeon pruning in column blocks.

    score of w_ij = w_ij^2 / U_jj^2; the lowest go; what a pruned weight contributed moves to the columns to its right

H, U and the letters are those of compensation.py. Deviations from the authors' code: n counts tokens, padding is left
out, counts are exact over the layer, and a Cholesky factorisation that fails is repeated with more damping.
"""

import itertools

import torch

from sparse_train.config import PruneConfig
from sparse_train.pruning.compensation import CompensatingPruner, compensate
from sparse_train.pruning.layers import num_kept
from sparse_train.pruning.pattern import keep_groups, keep_largest, lower_dropped
from sparse_train.pruning.pruner import Layer
from sparse_train.pruning.statistics import Hessian


class SparseGPT(CompensatingPruner):
    def prune(self, layer: Layer, statistics: Hessian) -> tuple[torch.Tensor, torch.Tensor]:
        """The updated weight is fp32. What an earlier level dropped stays dropped, though updates write there before a
        block's turn comes. Raises UserError, naming the layer, when the Hessian stays singular."""
        _, upper, dead = self.factor(layer, statistics)
        columns = layer.weight.detach().float().T.clone(memory_format=torch.contiguous_format)
        columns[dead] = 0
        keep = torch.zeros_like(columns, dtype=torch.bool)
        num_columns, num_rows = columns.shape
        group, width = layer.spec.group, _block_width(layer.spec)
        starts = range(0, num_columns, width)
        budgets = _budgets(num_rows, [*starts, num_columns], layer.spec.sparsity, layer.earlier)
        size = group[1] if group else width

        def finish(column: int) -> torch.Tensor:
            if column % size == 0:  # scores see the updates of the columns before
                ahead = slice(column, min(column + size, num_columns))
                scores = _scores(columns, upper, ahead, layer)
                chosen = keep_groups(scores, group) if group else keep_largest(scores, budgets[column // width])
                keep[ahead] = (chosen if layer.earlier is None else chosen & layer.earlier[:, ahead]).T
            return columns[column] * keep[column]

        compensate(columns, upper, width, finish, group[1] if group else 1)
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
