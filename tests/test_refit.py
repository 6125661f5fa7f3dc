"""The refit against least squares row by row, and after each method."""

import pytest
import torch

from sparse_train.config import PruneConfig
from sparse_train.errors import UserError
from sparse_train.pruning import build_pruner
from sparse_train.pruning.refit import refit
from sparse_train.registry import PRUNERS, PrunerEntry
from tests.layer_errors import layer_error
from tests.test_admm import PATTERNS, prune_layer
from tests.test_pruning import METHODS, make_problem

REFITTED = [method for method in METHODS if method != "obert"]


def _least_squares(weight, keep, hessian):
    weight, hessian, values = weight.double(), hessian.double(), torch.zeros(weight.shape, dtype=torch.float64)
    for row, place in enumerate(keep):
        values[row, place] = torch.linalg.solve(hessian[place][:, place], hessian[place] @ weight[row])
    return values


def test_a_refit_solves_every_row_and_leaves_empty_and_whole_ones():
    weight, _, hessian = make_problem(rows=5)
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    keep[0], keep[1] = False, True
    found = refit(weight, weight * keep, keep, hessian, 200)
    torch.testing.assert_close(found.double(), _least_squares(weight, keep, hessian), rtol=1e-3, atol=1e-3)
    assert not found[0].any() and torch.equal(found[1], weight[1])


@pytest.mark.parametrize("method", REFITTED)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("in_chain", [False, True])
def test_a_method_keeps_its_bits_and_gets_the_values_of_least_squares(method, pattern, in_chain):
    weight, _, hessian = make_problem()
    earlier = torch.rand(weight.shape, generator=torch.Generator().manual_seed(2)) < 0.8 if in_chain else None
    weight = weight if earlier is None else weight * earlier
    hessian[5] = hessian[:, 5] = 0  # a column that never fires
    plain, bits = prune_layer(method, weight, hessian, earlier, **pattern, damping=0.05, refit=False)
    found, keep = prune_layer(method, weight, hessian, earlier, **pattern, damping=0.05, refit=True)
    assert torch.equal(keep, bits) and not found[~keep].any() and not (in_chain and (keep & ~earlier).any())
    hessian[5, 5] = 1
    damped = hessian + 0.05 * hessian.diagonal().mean() * torch.eye(len(hessian))
    torch.testing.assert_close(found.double(), _least_squares(weight, keep, damped), rtol=1e-2, atol=1e-2)
    assert layer_error(found, weight, damped) < layer_error(plain, weight, damped)


def test_which_methods_are_refitted_and_what_that_reads():
    for method in REFITTED:
        for refit_key, expected in ((None, method in ("admm", "alps")), (False, False), (True, True)):
            spec = PruneConfig(method=method, sparsity=0.5, refit=refit_key)
            assert spec.refits == expected
            assert spec.calibrates == (method != "magnitude" or expected)
            assert (build_pruner(spec).Statistics is not None) == spec.calibrates
    assert build_pruner(PruneConfig(method="magnitude", sparsity=0.5, refit=True)).without_inputs == \
        "use prune.method=magnitude with prune.refit=false"


class _Counting:
    """Another package's statistics."""


class _ByCounts(PRUNERS.load("magnitude")):
    Statistics = _Counting


def test_a_method_of_other_statistics_is_not_refitted(monkeypatch):
    monkeypatch.setitem(PRUNERS.entries, "mine", PrunerEntry(f"{__name__}:_ByCounts"))
    build_pruner(PruneConfig(method="mine", sparsity=0.5))
    with pytest.raises(UserError, match=r"^prune\.refit: prune\.method=mine prunes by _Counting, .*leave prune\.refit"):
        build_pruner(PruneConfig(method="mine", sparsity=0.5, refit=True))
    with pytest.raises(UserError, match=r"^prune\.refit: prune\.method=obert prunes by Gradients"):
        build_pruner(PruneConfig(method="obert", sparsity=0.5, refit=True))
