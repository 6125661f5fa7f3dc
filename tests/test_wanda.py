"""Wanda against its definition, row by row in plain Python."""

import itertools
import math

import pytest
import torch

from sparse_train.config import PruneConfig
from sparse_train.errors import UserError
from sparse_train.models import family_of
from sparse_train.pruning import prune
from sparse_train.pruning.pruner import Layer
from sparse_train.pruning.statistics import ColumnNorms, Hessian
from sparse_train.pruning.wanda import Wanda
from sparse_train.tasks import Batch
from tests.models import tiny_mpt


def _problem(rows=6, columns=16):
    generator = torch.Generator().manual_seed(1)
    scale = torch.rand(columns, generator=generator) * 5
    return torch.randn(rows, columns, generator=generator), torch.randn(50, columns, generator=generator) * scale


def _prune(weight, inputs, earlier=None, **spec):
    norms = ColumnNorms(weight.shape[1], weight.device)
    for part in inputs.split(20):  # batch after batch
        norms.add(part)
    return Wanda().prune(Layer("some.layer", weight, PruneConfig(method="wanda", **spec).levels[0], earlier), norms)


def _scores(weight, inputs):
    norms = [math.sqrt(sum(x * x for x in column)) for column in inputs.double().T.tolist()]
    return [[abs(w) * norm for w, norm in zip(row, norms, strict=True)] for row in weight.double().tolist()]


def _best(scores, count):
    return sorted(sorted(range(len(scores)), key=lambda j: -scores[j])[:count])


def _kept(keep):
    return [row.nonzero().flatten().tolist() for row in keep]


@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.0])
def test_each_row_keeps_its_own_largest_scores_and_nothing_is_updated(sparsity):
    weight, inputs = _problem()
    pruned, keep = _prune(weight, inputs, sparsity=sparsity)
    assert _kept(keep) == [_best(row, round((1 - sparsity) * 16)) for row in _scores(weight, inputs)]
    assert torch.equal(pruned, weight * keep)


def test_a_hessian_has_the_norms_of_columns():
    """prune.refit collects it in their place."""
    found = [kind(16, torch.device("cpu")) for kind in (ColumnNorms, Hessian)]
    for part, statistics in itertools.product(_problem()[1].split(20), found):
        statistics.add(part)
    torch.testing.assert_close(found[1].norms(), found[0].norms(), rtol=1e-6, atol=0)


def test_groups_keep_their_largest_scores():
    weight, inputs = _problem()
    _, keep = _prune(weight, inputs, pattern="2:4")
    expected = [[start + j for start in range(0, 16, 4) for j in _best(row[start:start + 4], 2)]
                for row in _scores(weight, inputs)]
    assert _kept(keep) == expected


def test_a_remainder_goes_to_the_rows_whose_next_score_is_the_largest():
    weight, inputs = _problem()
    _, keep = _prune(weight, inputs, sparsity=0.6)
    scores, total = _scores(weight, inputs), round(0.4 * 6 * 16)
    share = total // 6
    richest = sorted(range(6), key=lambda i: -sorted(scores[i], reverse=True)[share])[:total % 6]
    assert total % 6 and _kept(keep) == [_best(row, share + (i in richest)) for i, row in enumerate(scores)]


def test_a_row_that_an_earlier_level_emptied_leaves_its_share_to_the_others():
    weight, inputs = _problem()
    earlier = torch.ones(6, 16, dtype=torch.bool)
    earlier[0, 1:] = False  # one is left, four are its share
    earlier[1, ::2] = False
    _, keep = _prune(weight, inputs, earlier, sparsity=0.75)
    assert not (keep & ~earlier).any() and keep.sum() == 24
    assert keep.sum(1).tolist()[0] == 1 and sorted(keep.sum(1).tolist()[1:]) == [4, 4, 5, 5, 5]
    _, keep = _prune(weight, inputs, earlier, pattern="2:4")
    assert not (keep & ~earlier).any() and keep[0].sum() == 1


def test_padding_is_left_out_of_the_norms():
    def batches(padding):
        ids = torch.zeros(2, 12 + padding, dtype=torch.long)
        ids[:, :12] = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(5))
        attend = torch.zeros_like(ids, dtype=torch.bool)
        attend[:, :12] = True
        return [Batch(ids, attend, ids)]

    def pruned(padding):
        torch.manual_seed(0)
        return prune(tiny_mpt(), batches(padding), PruneConfig(method="wanda", sparsity=0.5))

    plain, padded = pruned(0), pruned(9)
    assert all(torch.equal(weight.keep, padded[name].keep) for name, weight in plain.items())


def test_the_norms_are_those_of_what_the_pruned_blocks_before_it_make():
    torch.manual_seed(0)
    model, ids = tiny_mpt(), torch.arange(24).view(2, 12)
    dense = {name: linear.weight.clone() for name, linear in family_of(model).prunable_linears(model).items()}
    weights = prune(model, [Batch(ids, torch.ones_like(ids, dtype=torch.bool), ids)],
                    PruneConfig(method="wanda", sparsity=0.75))
    name, inputs = "transformer.blocks.1.attn.Wqkv", []
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(input_ids=ids)
    _, keep = _prune(dense[name], inputs[0], sparsity=0.75)
    assert torch.equal(weights[name].keep, keep)


def test_what_is_not_finite_is_named():
    weight, inputs = _problem()
    for bad in ((weight * torch.nan, inputs), (weight, inputs * torch.inf)):
        with pytest.raises(UserError, match=r"^some\.layer: .* is not finite"):
            _prune(*bad, sparsity=0.5)
