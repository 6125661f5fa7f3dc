"""ALPS against Algorithm 1 of its paper in float64."""

import pytest
import torch

from sparse_train.config import PruneConfig
from sparse_train.pruning.pattern import keep_groups, keep_largest
from tests.test_admm import PATTERNS, prune_layer
from tests.test_pruning import make_problem


def _definition(weight, hessian, spec, rho):
    """With multipliers V, and a system of equations in each iteration; (D, its bits, the lowest rho)."""
    h = hessian.double() + spec.damping * hessian.diagonal().double().mean() * torch.eye(len(hessian))
    scale = h.diagonal().sqrt()
    scaled, h, growing = weight.double() * scale, h / scale[:, None] / scale, False

    def project(x):
        keep = keep_groups(x.abs(), spec.group) if spec.group else keep_largest(x.abs(), kept)
        return torch.where(keep, x, 0)

    kept = round((1 - spec.sparsity) * weight.numel())
    lowest = rho
    d, v, before = project(scaled), torch.zeros_like(scaled), project(scaled) != 0
    for index in range(300):
        b = torch.linalg.solve(h + rho * torch.eye(len(h)), scaled @ h - v + rho * d, left=False)
        d = project(b + v / rho)
        v += rho * (b - d)
        if index % 3 == 2:
            change = int(((d != 0) != before).sum()) / kept
            before = d != 0
            if not growing and change <= 0.005:
                lowest = rho = rho / 5
                d, v, before = project(scaled), torch.zeros_like(v), project(scaled) != 0
            elif change == 0 or (index >= 30 and change < 0.0003):
                break
            else:
                growing = True
                rho *= 1.3 if change > 0.1 else 1.2 if change > 0.005 else 1.1
    return d / scale, d != 0, lowest


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("penalty", [0.1, 3000.0])
def test_alps_is_its_definition(pattern, penalty):
    """A first rho that is too large changes no bits, and falls."""
    weight, _, hessian = make_problem(rows=32)
    updated, keep = prune_layer("alps", weight, hessian, **pattern, refit=False, options={"penalty": penalty})
    expected, expected_keep, lowest = _definition(weight, hessian, PruneConfig(method="alps", **pattern), penalty)
    assert (lowest < penalty) == (penalty > 1)
    assert torch.equal(keep, expected_keep)
    torch.testing.assert_close(updated.double(), expected, rtol=1e-3, atol=1e-3)


def test_values_are_those_of_the_bits_where_the_last_iteration_begins_anew():
    """With this rho some bits change in three iterations, too few to go on with it, and there is no fourth."""
    weight, _, hessian = make_problem(rows=128, columns=256, tokens=1000)
    updated, keep = prune_layer("alps", weight, hessian, sparsity=0.5, refit=False,
                                options={"iterations": 3, "penalty": 0.25})
    assert torch.equal(updated != 0, keep)
