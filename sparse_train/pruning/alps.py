"""ALPS (Meng et al., NeurIPS 2024, arXiv 2406.07831): ADMM whose penalty follows how much the bits still change.

    minimise   tr((B - W) H (B - W)^T)   over sparse B; with inputs scaled so that the damped H has a unit diagonal
    B = (W H + rho (D - U)) (H + rho I)^-1
    D = the largest |B + U|, as many as survive        U = U + B - D

This is Algorithm 1 (section 3.2), with the multipliers V = rho U. Every third iteration rho grows by a factor that
depends on how many bits have changed since the last time, until none does. One eigendecomposition gives the inverse for
every rho. The values are then refitted on the bits of D (section 3.3), which is prune.refit. As in the authors' code,
rho falls instead while it has not grown yet, and a few bits that go on changing do not prolong the method. Deviations:
counts are exact over the layer, and the eigendecomposition is fp32.

Letters: R rows (outputs), C columns (inputs).
"""

from typing import Annotated

import torch
from pydantic import Field

from sparse_train.config import Section
from sparse_train.config.base import Positive
from sparse_train.pruning.admm import with_unit_diagonal
from sparse_train.pruning.pattern import keep_best
from sparse_train.pruning.pruner import Layer, Pruner
from sparse_train.pruning.rows import multiply
from sparse_train.pruning.statistics import Hessian

_INTERVAL = 3  # iterations from one look at the bits to the next
_SLOW = 0.005  # changed bits over kept weights: a first rho with less is divided by _FALL, and all begins anew
_FALL, _LEAST = 5.0, 1e-4  # below which there is nothing to choose
_GROWTH = ((0.1, 1.3), (_SLOW, 1.2), (0.0, 1.1))  # with more than this share, the factor of rho
_SETTLED, _SETTLED_AFTER = 0.0003, 30  # a smaller share than this ends the method after so many iterations


class AlpsOptions(Section):
    """`prune.options` of prune.method=alps; the defaults are the paper's."""

    iterations: Positive = 300
    """At most; a layer usually ends earlier."""
    penalty: Annotated[float, Field(gt=0)] = 0.1
    """rho of the first iterations: how strongly B is drawn to its sparse form D."""


class Alps(Pruner[Hessian]):
    Statistics = Hessian
    Options = AlpsOptions
    options: AlpsOptions
    divides_rows = True

    def prune(self, layer: Layer, statistics: Hessian) -> tuple[torch.Tensor, torch.Tensor]:
        """The updated weight is fp32."""
        weight, hessian, scale = with_unit_diagonal(layer, statistics)
        eigenvalues, vectors = torch.linalg.eigh(hessian)
        eigenvalues.clamp_(min=0)  # rounding may leave some below
        target, rho, has_grown = multiply(weight, hessian), self.options.penalty, False
        first = keep = seen = keep_best(weight.abs(), layer)
        d, u = weight * first, torch.zeros_like(weight)
        inverse = (vectors / (eigenvalues + rho)) @ vectors.T
        for index in range(1, self.options.iterations + 1):
            b = multiply(target + rho * (d - u), inverse)
            keep = keep_best((b + u).abs(), layer)
            d = (b + u) * keep
            u += b - d
            if index % _INTERVAL:
                continue
            changed, seen = layer.count(keep ^ seen) / layer.count(keep), keep
            growth = next((factor for share, factor in _GROWTH if changed > share), None)
            if not has_grown and changed <= _SLOW and rho > _LEAST:
                rho /= _FALL
                keep = seen = first
                d, u = weight * first, torch.zeros_like(weight)
            elif growth is None or (changed < _SETTLED and index > _SETTLED_AFTER):
                break
            else:
                rho, u, has_grown = rho * growth, u / growth, True
            inverse = (vectors / (eigenvalues + rho)) @ vectors.T
        return d / scale, keep
