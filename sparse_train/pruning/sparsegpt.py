"""SparseGPT (Frantar and Alistarh, arXiv 2301.00774): layer-wise optimal-brain-surgeon pruning in column blocks.

    H = 2 / n * sum of x x^T over real tokens      U upper triangular with H^-1 = U^T U
    score of w_ij = w_ij^2 / U_jj^2; the lowest go; what a pruned weight contributed moves to the columns to its right

Letters: R rows (outputs), C columns (inputs). Deviations from the authors' code: n counts tokens, padding is left out,
counts are exact over the layer, and a failing Cholesky is tried again with more damping.
"""

import itertools
import logging

import torch

from sparse_train.config import PruneConfig
from sparse_train.errors import UserError
from sparse_train.pruning.pattern import dead_last, keep_groups, keep_largest, num_kept

log = logging.getLogger(__name__)
_TRIES = 5


class Hessian:
    """Accumulates H (C, C) in fp32 from a linear's inputs."""

    def __init__(self, num_columns: int, device: torch.device):
        self.sum, self.num_tokens = torch.zeros(num_columns, num_columns, device=device), 0

    def add(self, inputs: torch.Tensor) -> None:
        """`inputs` (tokens, C): real tokens only."""
        inputs = inputs.float()
        self.sum.addmm_(inputs.T, inputs, alpha=2.0)
        self.num_tokens += len(inputs)

    def mean(self) -> torch.Tensor:
        return self.sum / self.num_tokens


def sparsegpt(weight: torch.Tensor, hessian: torch.Tensor, spec: PruneConfig,
              name: str = "weight", earlier: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(updated weight (R, C) in fp32 with zeros where pruned, keep (R, C)) from `hessian` (C, C).

    What `earlier` (R, C) dropped stays dropped, though updates write there before a block's turn comes.
    Raises UserError, naming the layer, when the Hessian stays singular.
    """
    weight, hessian = weight.detach().float().clone(), hessian.clone()
    for what, tensor in (("its weight", weight), ("what reaches it in calibration", hessian)):
        if not torch.isfinite(tensor).all():
            raise UserError(f"{name}: {what} is not finite; the dense model is damaged or overflows")
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1
    weight[:, dead] = 0
    upper = _inverse_factor(hessian, spec.damping, name)
    keep = torch.zeros_like(weight, dtype=torch.bool)
    num_rows, num_columns = weight.shape
    width = _block_width(spec)
    starts = range(0, num_columns, width)
    budgets = _budgets(num_rows, [*starts, num_columns], spec.sparsity, earlier)
    for start, budget in zip(starts, budgets, strict=True):
        stop = min(start + width, num_columns)
        errors = _prune_block(weight, keep, upper, start, stop, budget, spec, earlier)
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return weight, keep


def _block_width(spec: PruneConfig) -> int:
    """Whole groups of an N:M pattern per block."""
    if spec.group is None:
        return spec.block_size
    size = spec.group[1]
    return max(size, spec.block_size // size * size)


def _budgets(num_rows: int, edges: list[int], sparsity: float, earlier: torch.Tensor | None) -> list[int]:
    """Weights kept per block of columns edges[i]..edges[i + 1] - 1: its share, as far as `earlier` has left as many;
    what one block lacks goes to those that have more."""
    shares = [num_kept(num_rows * stop, sparsity) - num_kept(num_rows * start, sparsity)
              for start, stop in itertools.pairwise(edges)]
    if earlier is None:
        return shares
    left = [int(earlier[:, start:stop].sum()) for start, stop in itertools.pairwise(edges)]
    budgets = [min(share, alive) for share, alive in zip(shares, left, strict=True)]
    lacking = sum(shares) - sum(budgets)
    for index, alive in enumerate(left):
        more = min(lacking, alive - budgets[index])
        budgets[index] += more
        lacking -= more
    return budgets


def _prune_block(weight, keep, upper, start, stop, budget, spec, earlier) -> torch.Tensor:
    """Prune columns start..stop-1 in place, one after the other; returns the scaled errors (R, stop - start)."""
    diagonal = upper.diagonal()

    def scores(part: slice) -> torch.Tensor:
        return dead_last(weight[:, part].square() / diagonal[part].square(),
                         None if earlier is None else earlier[:, part])

    if spec.group is None:
        keep[:, start:stop] = keep_largest(scores(slice(start, stop)), budget)
    errors = torch.zeros_like(weight[:, start:stop])
    for column in range(start, stop):
        if spec.group and (column - start) % spec.group[1] == 0:
            ahead = slice(column, column + spec.group[1])  # scores see the updates of the columns before
            keep[:, ahead] = keep_groups(scores(ahead), spec.group)
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
    for attempt in range(_TRIES):
        damped = hessian + torch.diag(torch.full_like(hessian.diagonal(), damping * 10**attempt) * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
        log.warning("%s: Cholesky failed with damping %g; trying ten times as much", name, damping * 10**attempt)
    raise UserError(f"{name}: its Hessian is singular even with damping {damping * 10**(_TRIES - 1):g}; raise "
                    "prune.num_calibration or prune.damping, or use prune.method=magnitude")
