"""Pruning over ranks: the same bits whatever their number."""

import pytest
import torch

from sparse_train import dist
from sparse_train.config import PruneConfig
from sparse_train.errors import UserError
from sparse_train.pruning import prune
from sparse_train.pruning.blockwise import assign
from sparse_train.tasks.batch import collate
from tests.models import tiny_examples, tiny_model
from tests.ranks import run_ranks

SPECS = [("llama", {"sparsity": 0.6}), ("t5", {"pattern": "2:4", "method": "wanda"}),
         ("mpt", {"sparsity": 0.7, "method": "admm"}), ("opt", {"sparsity": 0.5, "method": "magnitude"})]


def _prune_all(specs):
    """[{name: (values, bitmask)} of each], and the models' weights are those."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # products may add in another order on more
    try:
        return [_pruned(family, PruneConfig(**spec)) for family, spec in specs]
    finally:
        torch.set_num_threads(num_threads)


def _pruned(family, spec):
    model, processor = tiny_model(family)
    examples = tiny_examples(processor)
    batches = [collate(examples[index:index + 1], processor) for index in range(len(examples))]
    weights = prune(model, batches[dist.rank()::dist.world_size()], spec)
    for name, weight in weights.items():
        assert torch.equal(model.get_submodule(name).weight, weight.to_dense()), name
    return {name: (weight.values, weight.bitmask) for name, weight in weights.items()}


@pytest.mark.parametrize("world, specs", [(3, SPECS[:2]), *(
    pytest.param(world, SPECS, marks=pytest.mark.slow) for world in (2, 3, 5))])
def test_the_number_of_ranks_changes_no_bit(world, specs):
    """Of four batches, three ranks have two, one and one; the last of five has none."""
    alone = _prune_all(specs)
    for rank, found in enumerate(run_ranks(_prune_all, world, specs)):
        for (family, _), mine, expected in zip(specs, found, alone, strict=True):
            assert list(mine) == list(expected)
            for name, tensors in expected.items():
                assert all(map(torch.equal, mine[name], tensors)), (rank, family, name)


def _fails():
    try:
        _pruned("mpt", PruneConfig(sparsity=0.6, damping=1e-30))
    except UserError as error:
        return str(error)
    return ""


def test_what_one_rank_cannot_prune_is_said_by_all():
    messages = run_ranks(_fails, 2)
    assert messages[0] == messages[1] and "its Hessian is singular" in messages[0]


def test_linears_are_divided_by_their_cost():
    shapes = {"small": (8, 8), "down": (8, 32), "up": (32, 8), "query": (8, 8), "key": (8, 8)}
    rank_of = assign(shapes, 2)
    assert rank_of["down"] == 0 and {rank for name, rank in rank_of.items() if name != "down"} == {1}
    assert set(assign(shapes, 1).values()) == {0} and sorted(assign(shapes, 8).values()) == [0, 1, 2, 3, 4]
