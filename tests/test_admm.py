"""ADMM against its definition in float64."""

import pytest
import torch

from sparse_train.config import PruneConfig
from sparse_train.errors import UserError
from sparse_train.pruning import build_pruner
from sparse_train.pruning.pattern import keep_groups, keep_largest
from sparse_train.pruning.pruner import Layer
from sparse_train.pruning.statistics import Hessian
from tests.test_pruning import make_problem

PATTERNS = [{"sparsity": 0.5}, {"sparsity": 0.7}, {"pattern": "2:4"}]


def prune_layer(method, weight, hessian, earlier=None, **keys):
    statistics = Hessian(len(hessian), hessian.device)
    statistics.sum, statistics.num_tokens = hessian.flatten(), 1  # one piece
    spec = PruneConfig(method=method, **keys)
    pruner = build_pruner(spec)
    return pruner.prune(Layer("some.layer", weight, spec.levels[0], earlier), pruner.Statistics and statistics)


def _definition(weight, hessian, spec, rho=1.0):
    """Columns and inputs are scaled one by one, X solves a system of equations in each iteration."""
    h = hessian.double() + spec.damping * hessian.diagonal().double().mean() * torch.eye(len(hessian))
    scale = h.diagonal().sqrt()
    scaled, h = weight.double() * scale, h / scale[:, None] / scale
    x, u = scaled.clone(), torch.zeros_like(scaled)
    for index in range(1, 22):
        sparsity = spec.sparsity * (1 - (1 - index / 15) ** 3 if index < 15 else 1)
        scores = (x + u).abs()
        count = round((1 - sparsity) * scores.numel())
        keep = keep_groups(scores, spec.group) if spec.group else keep_largest(scores, count)
        z = torch.where(keep, x + u, 0)
        u = x + u - z
        x = torch.linalg.solve(h + rho * torch.eye(len(h)), scaled @ h + rho * (z - u), left=False)
    return z / scale, keep


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_admm_is_its_definition(pattern):
    weight, _, hessian = make_problem()
    spec = PruneConfig(method="admm", **pattern)
    updated, keep = prune_layer("admm", weight, hessian, **pattern, refit=False)
    expected, expected_keep = _definition(weight, hessian, spec)
    assert torch.equal(keep, expected_keep)
    torch.testing.assert_close(updated.double(), expected, rtol=1e-3, atol=1e-3)


def test_options_are_checked():
    with pytest.raises(UserError, match=r"prune\.options\.iterations"):
        build_pruner(PruneConfig(method="admm", sparsity=0.5, options={"iterations": 0}))
