"""ADMM against its definition in float64, and the refit against least squares row by row."""

import pytest
import torch

from sparse_train.config import PruneConfig
from sparse_train.errors import UserError
from sparse_train.pruning import build_pruner
from sparse_train.pruning.pattern import keep_groups, keep_largest
from sparse_train.pruning.pruner import Layer
from sparse_train.pruning.refit import refit
from sparse_train.pruning.statistics import Hessian
from tests.test_pruning import make_problem

_PATTERNS = [{"sparsity": 0.5}, {"sparsity": 0.7}, {"pattern": "2:4"}]


def _prune(method, weight, hessian, **keys):
    statistics = Hessian(len(hessian), hessian.device)
    statistics.sum, statistics.num_tokens = hessian, 1
    spec = PruneConfig(method=method, **keys)
    return build_pruner(spec).prune(Layer("some.layer", weight, spec.levels[0]), statistics)


def _error(updated, weight, hessian):
    """The definition's, relative to that of a layer without weights."""
    difference, whole = (updated - weight).double(), weight.double()
    hessian = hessian.double()
    return float(((difference @ hessian) * difference).sum() / ((whole @ hessian) * whole).sum())


def _definition(weight, hessian, spec, rho=1.0, damping=0.1):
    """Of the bits. Columns and inputs are scaled one by one, X solves a system of equations in each iteration."""
    scale = hessian.diagonal().double().sqrt()
    scaled, h = weight.double() * scale, hessian.double() / scale[:, None] / scale
    h += damping * torch.eye(len(h))
    x, u = scaled.clone(), torch.zeros_like(scaled)
    for index in range(1, 22):
        sparsity = spec.sparsity * (1 - (1 - index / 15) ** 3 if index < 15 else 1)
        scores = (x + u).abs()
        count = round((1 - sparsity) * scores.numel())
        keep = keep_groups(scores, spec.group) if spec.group else keep_largest(scores, count)
        z = torch.where(keep, x + u, 0)
        u = x + u - z
        x = torch.linalg.solve(h + rho * torch.eye(len(h)), scaled @ h + rho * (z - u), left=False)
    return keep, scaled, h, scale


@pytest.mark.parametrize("pattern", _PATTERNS, ids=str)
def test_admm_is_its_definition(pattern):
    weight, _, hessian = make_problem()
    spec = PruneConfig(method="admm", **pattern)
    updated, keep = _prune("admm", weight, hessian, **pattern, options={"refit_iterations": 60})
    expected, scaled, h, scale = _definition(weight, hessian, spec)
    assert torch.equal(keep, expected)
    exact = torch.stack([_least_squares(*row, h) for row in zip(scaled, keep, strict=True)]) / scale
    torch.testing.assert_close(updated.double(), exact, rtol=1e-3, atol=1e-4)


def _least_squares(weight, keep, hessian):
    values, place = torch.zeros_like(weight), keep.nonzero().flatten()
    values[place] = torch.linalg.solve(hessian[place][:, place], hessian[place] @ weight)
    return values


def test_a_refit_solves_every_row_and_leaves_empty_and_whole_ones():
    weight, _, hessian = make_problem(rows=5)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    keep[0], keep[1] = False, True
    found = refit(weight, weight * keep, keep, hessian, 200)
    exact = torch.stack([_least_squares(*row, hessian.double()) for row in zip(weight.double(), keep, strict=True)])
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-3)
    assert not found[0].any() and torch.equal(found[1], weight[1])
    assert torch.equal(refit(weight, weight * keep, keep, hessian, 0), weight * keep)


@pytest.mark.parametrize("pattern", _PATTERNS, ids=str)
def test_the_layer_errors_are_below_that_of_sparsegpt(pattern):
    weight, _, hessian = make_problem(rows=64, columns=96, tokens=400)
    updated, keep = _prune("sparsegpt", weight, hessian, **pattern)
    bound = 0.6 * _error(updated, weight, hessian)
    assert _error(_prune("admm", weight, hessian, **pattern)[0], weight, hessian) < bound
    assert _error(refit(weight, updated, keep, hessian, 20), weight, hessian) < bound


def test_options_are_checked():
    with pytest.raises(UserError, match=r"prune\.options\.iterations"):
        build_pruner(PruneConfig(method="admm", sparsity=0.5, options={"iterations": 0}))
