"""Columns of a weight get their final values one after the other, and what each loses moves to those behind it: the
optimal brain surgeon for a whole layer, as SparseGPT (arXiv 2301.00774) prunes and GPTQ (arXiv 2210.17323) rounds.

    H = 2 / n * sum of x x^T over real tokens      U upper triangular with H^-1 = U^T U
    column j: w_j becomes q_j, and w_k loses U_jk (w_j - q_j) / U_jj for every k > j

Letters: R rows (outputs), C columns (inputs).
"""

import logging
from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch

from sparse_train.config import Section
from sparse_train.errors import UserError
from sparse_train.pruning.pruner import Layer, Pruner
from sparse_train.pruning.statistics import Hessian

log = logging.getLogger(__name__)
_CHOLESKY_ATTEMPTS = 5
_NARROW = 16  # columns that are updated one by one


class Factor(NamedTuple):
    damping: torch.Tensor
    """What was added to the diagonal of H, which is 1 for a column that never fires; a scalar."""
    upper: torch.Tensor
    """U (C, C) of that."""
    dead: torch.Tensor
    """(C,): the columns that never fire."""


class CompensatingPruner(Pruner[Hessian]):
    """A method that calls `compensate`."""

    Statistics = Hessian

    def __init__(self, options: Section | None = None):
        super().__init__(options)
        self._last: WeakKeyDictionary[Hessian, tuple[tuple[int, float], Factor]] = WeakKeyDictionary()
        """What the factor of the layer before was made from, and itself: the next layer often has the same inputs. A
        factor is as large as its Hessian, and is dropped with it."""

    def factor(self, layer: Layer, statistics: Hessian) -> Factor:
        """Raises UserError, naming the layer, where the Hessian stays singular."""
        layer.require_finite(statistics)
        source = (statistics.num_tokens, layer.spec.damping)
        if statistics not in self._last or self._last[statistics][0] != source:
            self._last.clear()
            hessian = statistics.mean()
            dead = hessian.diagonal() == 0
            hessian.diagonal()[dead] = 1
            self._last[statistics] = source, Factor(*self._damp_and_factorise(hessian, layer), dead)
        return self._last[statistics][1]

    def _damp_and_factorise(self, hessian: torch.Tensor, layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
        """(what was added to the diagonal, U of the sum). Beside `hessian`, which changes, two of its size are held."""
        diagonal = hessian.diagonal()  # a view
        original, mean, damping = diagonal.clone(), diagonal.mean(), layer.spec.damping
        for attempt in range(_CHOLESKY_ATTEMPTS):
            added = damping * 10**attempt * mean
            diagonal.copy_(original + added)
            lower, failed = torch.linalg.cholesky_ex(hessian)
            if not failed:
                inverse = torch.cholesky_inverse(lower)
                del lower
                upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
                if not failed:
                    return added, upper
            log.warning("%s: Cholesky failed with damping %g; trying ten times as much", layer.name,
                        damping * 10**attempt)
        raise UserError(f"{layer.name}: its Hessian is singular even with damping "
                        f"{damping * 10**(_CHOLESKY_ATTEMPTS - 1):g}; raise prune.num_calibration or prune.damping, or "
                        f"{self.without_inputs}")


def compensate(columns: torch.Tensor, upper: torch.Tensor, width: int, finish: Callable[[int], torch.Tensor],
               size: int = 1) -> None:
    """Replace each of `columns` (C, R) by `finish(column)` (R,), in order, after those before it have been replaced and
    their errors have come to it.

    `columns` has a weight's columns as rows, so that each is contiguous. The errors of `width` columns, a multiple of
    `size`, reach those behind them in one product. Where `finish` decides for several columns at once, as for N:M, they
    are `size` and begin at a multiple of it.
    """
    for start in range(0, len(columns), width):
        stop = min(start + width, len(columns))
        errors = torch.empty_like(columns[start:stop])
        _compensate(columns, upper, start, stop, errors, finish, size)
        columns[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)


def _compensate(columns: torch.Tensor, upper: torch.Tensor, start: int, stop: int, errors: torch.Tensor,
                finish: Callable[[int], torch.Tensor], size: int) -> None:
    """The columns from start to stop - 1; their scaled errors go to `errors`.

    A half is finished before one product takes its errors to the other half: few columns are updated one by one.
    """
    half = (stop - start) // 2 // size * size
    if half and stop - start > _NARROW:
        middle = start + half
        _compensate(columns, upper, start, middle, errors[:half], finish, size)
        columns[middle:stop].addmm_(upper[start:middle, middle:stop].T, errors[:half], alpha=-1)
        _compensate(columns, upper, middle, stop, errors[half:], finish, size)
        return
    for column in range(start, stop):
        final, error = finish(column), errors[column - start]
        torch.sub(columns[column], final, out=error).div_(upper[column, column])
        columns[column] = final
        columns[column + 1:stop].addr_(upper[column, column + 1:stop], error, alpha=-1)
