"""ADMM (Boza, arXiv 2401.02938): the sparse weight is found by alternating least squares and projection, not column by
column; its survivors are then refitted (prune.refit).

    minimise   tr((X - W) H (X - W)^T)   over sparse X; with inputs scaled so that the damped H has a unit diagonal
    Z = the largest |X + U|, as many as the iteration keeps        U = X + U - Z
    X = (W H + rho (Z - U)) (H + rho I)^-1

The sparsity of the first iterations rises with a cubic curve. One inverse serves all of them. Deviations from the
paper: counts are exact over the layer, H is damped as for every other method (by prune.damping, where the authors' code
adds 0.1 to the scaled one), and the values are refitted.

Letters: R rows (outputs), C columns (inputs).
"""

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field

from sparse_train.config import Section
from sparse_train.config.base import Positive
from sparse_train.pruning.pattern import keep_best
from sparse_train.pruning.pruner import Layer, Pruner
from sparse_train.pruning.rows import multiply
from sparse_train.pruning.statistics import Hessian


class AdmmOptions(Section):
    """`prune.options` of prune.method=admm; the defaults of the numbers are the paper's."""

    iterations: Positive = 20
    ramp: Annotated[int, Field(ge=0)] = 15
    """Iterations until the layer's whole sparsity is reached; of an N:M pattern it is at once."""
    penalty: Annotated[float, Field(gt=0)] = 1.0
    """rho: how strongly X is drawn to its sparse form Z."""


class Admm(Pruner[Hessian]):
    Statistics = Hessian
    Options = AdmmOptions
    options: AdmmOptions
    divides_rows = True

    def prune(self, layer: Layer, statistics: Hessian) -> tuple[torch.Tensor, torch.Tensor]:
        """The updated weight is fp32."""
        spec, (weight, hessian, scale) = layer.spec, with_unit_diagonal(layer, statistics)
        target = multiply(weight, hessian)
        hessian.diagonal().add_(self.options.penalty)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        x, u = weight, torch.zeros_like(weight)
        for index in range(1, self.options.iterations + 1):
            left = max(0.0, 1 - index / self.options.ramp) if self.options.ramp else 0.0
            eased = replace(layer, spec=spec.model_copy(update={"sparsity": spec.sparsity * (1 - left**3)}))
            keep = keep_best((x + u).abs(), eased)
            z = (x + u) * keep
            u += x - z
            x = multiply(target + self.options.penalty * (z - u), inverse)
        keep = keep_best((x + u).abs(), layer)
        return (x + u) * keep / scale, keep


def with_unit_diagonal(layer: Layer, statistics: Hessian) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weight (R, C) fp32, damped Hessian (C, C), scale (C,)) of inputs divided by `scale`, with which the diagonal is
    1. Columns that never fire have weight 0. Raises UserError where something is not finite."""
    layer.require_finite(statistics)
    hessian, dead = statistics.damped(layer.spec.damping)
    scale = hessian.diagonal().sqrt()
    hessian /= scale[:, None] * scale
    return (layer.weight.detach().float() * scale).masked_fill(dead, 0), hessian, scale
