"""Layer-wise sparsity: what OWL and the arithmetic progression give a block, and that the budget is exact."""

import itertools
import math
import random
from fractions import Fraction

import pytest
import torch

from sparse_train.config import PruneConfig, RunConfig
from sparse_train.errors import UserError
from sparse_train.launch.run.stages import find_stage
from sparse_train.models import family_of
from sparse_train.pruning import prune
from sparse_train.pruning.allocation import _divide, allocate
from sparse_train.pruning.layers import num_kept
from sparse_train.pruning.parameters import count_parameters
from sparse_train.tasks import Batch
from tests.models import tiny_mpt


def _model(n_layers=3):
    torch.manual_seed(0)
    return tiny_mpt(n_layers=n_layers)


def _batches():
    ids = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(5))
    return [Batch(ids, torch.ones_like(ids, dtype=torch.bool), ids)]


def _blocks(weights):
    """Kept weights by block of an MPT."""
    counts = {}
    for name, weight in weights.items():
        counts.setdefault(name.split(".")[2], []).append(weight.values.numel())
    return list(counts.values())


def _by_hand(budget, sizes, densities):
    """Largest remainders in exact arithmetic, where no bound is met."""
    shift = (budget - sum(d * n for d, n in zip(densities, sizes, strict=True))) / sum(sizes)
    exact = [(d + shift) * n for d, n in zip(densities, sizes, strict=True)]
    counts = [math.floor(share) for share in exact]
    for index in sorted(range(len(sizes)), key=lambda i: (counts[i] - exact[i], i))[:budget - sum(counts)]:
        counts[index] += 1
    return counts


def test_an_arithmetic_progression_keeps_what_uniform_sparsity_keeps_to_the_weight():
    config = PruneConfig(method="magnitude", sparsity=0.7, allocation="atp", allocation_spread=0.1)
    sizes = [layer.weight.numel() for layer in family_of(_model()).prunable_linears(_model()).values()]
    weights = prune(_model(), [], config)
    found = list(itertools.chain(*_blocks(weights)))
    per_block = len(sizes) // 3
    densities = [Fraction(-1, 10) * (index // per_block) for index in range(len(sizes))]
    assert found == _by_hand(sum(round(0.3 * size) for size in sizes), sizes, densities)
    assert (sum(found),) == count_parameters(_model(), config).kept
    assert [round(1 - sum(block) / (sum(sizes) // 3), 3) for block in _blocks(weights)] == [0.6, 0.7, 0.8]


@pytest.mark.parametrize("seed", range(20))
def test_the_budget_is_exact_whatever_the_bounds(seed):
    draw = random.Random(seed)
    sizes = [draw.randint(5, 10**draw.randint(1, 9)) for _ in range(draw.randint(1, 30))]
    densities = [draw.random() for _ in sizes]
    most = [draw.randint(1, size) if seed % 2 else size for size in sizes]
    budget = draw.randint(len(sizes), sum(most))
    counts = _divide(budget, sizes, densities, most)
    assert sum(counts) == budget and all(1 <= count <= bound for count, bound in zip(counts, most, strict=True))
    inside = [(count / size - density, size) for count, size, density, bound in zip(counts, sizes, densities, most,
                                                                                   strict=True) if 1 < count < bound]
    assert all(abs(a - b) <= 1 / m + 1 / n for a, m in inside for b, n in inside)  # one shift for all
    assert all(num_kept(size, 1 - count / size) == count for count, size in zip(counts, sizes, strict=True))
    assert _divide(3, [4] * 4, [0.0] * 4, [4, 0, 4, 4]) == [1, 0, 1, 1]
    assert _divide(6, [4] * 4, [0.5] * 4, [4] * 4) == [2, 2, 1, 1]


def _outlier_shares(model, factor):
    """The definition, weight by weight, with norms from one pass of the model as it is."""
    linears, inputs = family_of(model).prunable_linears(model), {}
    handles = [linear.register_forward_pre_hook(lambda module, args, name=name: inputs.update({name: args[0]}))
               for name, linear in linears.items()]
    with torch.no_grad():
        model(input_ids=_batches()[0].input_ids)
    for handle in handles:
        handle.remove()
    scores = {}
    for name, linear in linears.items():
        norms = inputs[name].double().flatten(0, 1).norm(dim=0).tolist()
        scores.setdefault(name.split(".")[2], []).extend(
            abs(w) * norm for row in linear.weight.tolist() for w, norm in zip(row, norms, strict=True))
    means = [sum(block) / len(block) for block in scores.values()]
    return [sum(s > factor * mean for s in block) / len(block)
            for block, mean in zip(scores.values(), means, strict=True)]


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_owl_gives_blocks_density_by_their_share_of_outliers_in_the_dense_model(method):
    config = PruneConfig(method=method, sparsity=0.7, allocation="owl", outlier_factor=3.0)
    shares = _outlier_shares(_model(), 3.0)
    assert len(set(shares)) == 3
    sizes = [layer.weight.numel() for layer in family_of(_model()).prunable_linears(_model()).values()]
    densities = [0.16 * Fraction(shares[index * 3 // len(sizes)]) / Fraction(max(shares) - min(shares))
                 for index in range(len(sizes))]
    found = list(itertools.chain(*_blocks(prune(_model(), iter(_batches()), config))))
    assert found == _by_hand(sum(round(0.3 * size) for size in sizes), sizes, densities)


@pytest.mark.parametrize("allocation", ["atp", "owl"])
def test_a_chain_keeps_its_zeros_and_counts_exactly(allocation):
    """The second level would give some blocks more than the first one left of them."""
    config = PruneConfig(method="wanda", sparsity=(0.5, 0.52), allocation=allocation, allocation_spread=0.2,
                         outlier_factor=2.0)
    model, earlier = _model(), {}
    for level, kept in zip(config.levels, count_parameters(_model(), config).kept, strict=True):
        weights = prune(model, _batches(), level, earlier=earlier)
        assert sum(weight.values.numel() for weight in weights.values()) == kept
        assert all(not (weights[name].keep & ~keep).any() for name, keep in earlier.items())
        earlier = {name: weight.keep for name, weight in weights.items()}
        for index, (name, parameter) in enumerate(model.named_parameters()):  # training changes what is an outlier
            if name.removesuffix(".weight") in weights:
                parameter.data *= 1 + index % 3


def test_blocks_without_a_pruned_linear_do_not_count():
    weights = prune(_model(), [], PruneConfig(method="magnitude", sparsity=0.5, allocation="atp", allocation_spread=0.1,
                                              ignore=("*.blocks.1.*",)))
    assert [round(sum(block) / 12 / 32**2, 3) for block in _blocks(weights)] == [0.6, 0.4]
    (level,) = PruneConfig(sparsity=0.5, allocation="atp").levels
    found = allocate({"a.0.q": level}, {"a.0.q": 9}, ["a.0"], level, {}, lambda name: None)
    assert num_kept(9, found["a.0.q"].sparsity) == num_kept(9, 0.5)


def test_a_spread_that_leaves_nothing_of_a_block_is_refused():
    """All blocks but one have nearly as many outliers, so their mean is near the top of the spread."""
    names = [f"h.{index}.q" for index in range(12)]
    shares = {f"h.{index}": 0.05 + index / 1000 if index else 0.0 for index in range(12)}

    def counts(spread):
        (level,) = PruneConfig(sparsity=0.9, allocation="owl", allocation_spread=spread).levels
        found = allocate(dict.fromkeys(names, level), dict.fromkeys(names, 4096), list(shares), level, shares,
                         lambda name: None)
        return [num_kept(4096, spec.sparsity) for spec in found.values()]

    assert min(counts(0.05)) == counts(0.05)[0] > 50
    with pytest.raises(UserError, match=r"allocation_spread=0\.08 leaves nothing of h\.0 at sparsity 0\.9"):
        counts(0.08)


@pytest.mark.parametrize("keys, message", [
    ({"pattern": "2:4"}, "allocation=atp and pattern=2:4"),
    ({"sparsity": 0.5, "layer_sparsity": {"*": 0.1}}, "layer_sparsity and allocation=atp both decide"),
    ({"sparsity": (0.5, 0.95)}, r"allocation_spread=0\.08 leaves nothing .* at sparsity=0\.95; give less than 0\.05"),
])
def test_what_does_not_go_together_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        PruneConfig(allocation="atp", **keys)


@pytest.mark.parametrize("allocation, expected", [
    ("uniform", set()), ("atp", {"prune.allocation_spread"}),
    ("owl", {"prune.allocation_spread", "prune.outlier_factor", "prune.num_calibration", "task.path"})])
def test_a_pruning_depends_on_the_keys_that_its_allocation_reads(allocation, expected):
    config = RunConfig.model_validate({"prune": {"sparsity": 0.5, "method": "magnitude", "allocation": allocation}})
    assert expected == {"prune.allocation_spread", "prune.outlier_factor", "prune.num_calibration", "task.path"} & set(
        find_stage(config, "prune").reads)
