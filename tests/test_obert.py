"""oBERT against its paper's formulas in float64, with gradients of autograd through the whole model."""

import copy
import dataclasses

import pytest
import torch

from sparse_train.config import ModelConfig, PruneConfig
from sparse_train.errors import UserError
from sparse_train.models import build_model, family_of
from sparse_train.pruning import obert, prune
from sparse_train.pruning.pattern import keep_groups, keep_largest
from sparse_train.tasks.batch import collate
from tests.models import tiny_examples, tiny_model


def _gradients(model, batches):
    """Linear's name -> (examples, R, C)."""
    model = copy.deepcopy(model).double()
    found = {name: [] for name in family_of(model).prunable_linears(model)}
    for batch in batches:
        for ids, attend, labels in zip(batch.input_ids, batch.attend, batch.labels, strict=True):
            model.zero_grad()
            model(input_ids=ids[attend][None], labels=labels[attend][None]).loss.backward()
            for name, gradients in found.items():
                gradients.append(model.get_submodule(name).weight.grad.clone())
    return {name: torch.stack(gradients) for name, gradients in found.items()}


def _inverses(gradients, damping, width):
    """Columns of a block -> F^-1 (R, B, B) of the rows' blocks there."""
    strength, found = damping * gradients.square().mean((0, 2)), {}
    for start in range(0, gradients.shape[2], width):
        g = gradients[:, :, start:start + width]
        fisher = torch.einsum("mri,mrj->rij", g, g) / len(g)
        found[start, start + width] = torch.linalg.inv(fisher + strength[:, None, None] * torch.eye(g.shape[2]))
    return found


def _definition(weight, gradients, spec, width, earlier=None):
    """(values of some rows, keep (R, C))."""
    weight, earlier = weight.detach().double(), torch.ones(weight.shape) if earlier is None else earlier
    inverses, scores = _inverses(gradients * earlier, spec.damping, width), torch.empty_like(weight)
    for (start, stop), inverse in inverses.items():
        scores[:, start:stop] = weight[:, start:stop] ** 2 / (2 * inverse.diagonal(dim1=1, dim2=2))
    scores[earlier == 0] = -1
    keep = keep_groups(scores, spec.group) if spec.group else keep_largest(
        scores, round((1 - spec.sparsity) * weight.numel()))
    keep = keep & earlier.bool()
    updated = {row: weight[row].clone() for row in (0, 5, len(weight) - 1)}
    for (start, stop), inverse in inverses.items():
        for row, values in updated.items():
            lost, of_row = ~keep[row, start:stop], inverse[row]
            values[start:stop] -= of_row[:, lost] @ torch.linalg.solve(of_row[lost][:, lost],
                                                                       weight[row, start:stop][lost])
    return {row: values * keep[row] for row, values in updated.items()}, keep


def _problem(family="llama", num_blocks=2):
    model, processor = tiny_model(family)
    if num_blocks != 2:
        config = ModelConfig(family=family, d_model=32, n_layers=num_blocks, n_heads=4, max_seq_len=64)
        model = build_model(config, processor)
    examples = tiny_examples(processor)
    return model, [collate(examples[:3], processor), collate(examples[3:], processor)]


def _is_defined(pruned, dense, gradients, spec, width, earlier=None):
    for name, weight in pruned.items():
        expected, keep = _definition(dense.get_submodule(name).weight, gradients[name], spec, width,
                                     earlier and earlier[name])
        assert torch.equal(weight.keep, keep), name
        for row, values in expected.items():
            torch.testing.assert_close(weight.to_dense()[row].double(), values, rtol=1e-3,
                                       atol=1e-4 * values.abs().max(), msg=lambda m, at=(name, row): f"{at}: {m}")


@pytest.mark.parametrize("family, keys, size, width", [
    ("llama", {"sparsity": 0.6}, 10, 10), ("mpt", {"pattern": "2:4"}, 10, 8), ("gpt_neox", {"pattern": "1:16"}, 8, 16),
    ("opt", {"sparsity": 0.8}, 50, 50)])
def test_obert_is_its_definition(family, keys, size, width, monkeypatch):
    """Rows of 32 and of 128 weights do not divide by 10 and 50; 8 columns are two groups of four. Of the Fisher matrix
    there are a few rows at a time."""
    monkeypatch.setattr(obert, "_NUMBERS", 20000)
    model, batches = _problem(family)
    dense, gradients = copy.deepcopy(model), _gradients(model, batches)
    spec = PruneConfig(method="obert", damping=0.1, options={"fisher_block_size": size}, **keys)
    weights = prune(model, batches, spec)
    assert sorted(weights) == sorted(gradients)
    _is_defined(weights, dense, gradients, spec, width)


def test_gradients_are_those_of_the_dense_model_at_any_depth():
    """Of five blocks, the inputs of three are kept; those of two are computed again."""
    model, batches = _problem("mpt", 5)
    dense, gradients = copy.deepcopy(model), _gradients(model, batches)
    spec, order = PruneConfig(method="obert", sparsity=0.7, damping=0.1), []
    _is_defined(prune(model, batches, spec, lambda done, total, block: order.append(block)), dense, gradients, spec, 50)
    assert order == [f"transformer.blocks.{index}" for index in (4, 3, 2, 1, 0)]


def test_what_an_earlier_level_dropped_takes_no_part():
    model, batches = _problem()
    earlier = {name: weight.keep for name, weight in prune(model, batches, PruneConfig(sparsity=0.5)).items()}
    dense, gradients = copy.deepcopy(model), _gradients(model, batches)
    spec = PruneConfig(method="obert", sparsity=0.75, damping=0.1)
    _is_defined(prune(model, batches, spec, earlier=earlier), dense, gradients, spec, 50, earlier)


def test_it_works_with_what_chooses_layers_and_trains_blocks():
    """Reconstruction compares with the dense block on the dense model's inputs."""
    model, batches = _problem()
    linears = family_of(model).dense_linears(model).values()
    weights = prune(model, batches, PruneConfig(method="obert", sparsity=0.5, allocation="owl"))
    assert sum(weight.values.numel() for weight in weights.values()) == sum(x.weight.numel() // 2 for x in linears)
    model, batches = _problem()
    plain = prune(copy.deepcopy(model), batches, PruneConfig(method="obert", sparsity=0.6, ignore=("*.o_proj",)))
    trained = prune(model, batches, PruneConfig(method="obert", sparsity=0.6, ignore=("*.o_proj",),
                                                reconstruction={"steps": 3}))
    assert len(plain) == 12
    for name, weight in plain.items():
        assert torch.equal(weight.bitmask, trained[name].bitmask)
        assert not torch.equal(weight.values, trained[name].values), name


def test_what_gives_no_gradient_or_none_that_is_finite_is_named():
    spec = PruneConfig(method="obert", sparsity=0.5)
    model, batches = _problem()
    without_targets = [dataclasses.replace(batch, labels=torch.full_like(batch.labels, -100)) for batch in batches]
    for nothing in ([], without_targets):
        with pytest.raises(UserError, match=r"no gradient of the loss reaches model\.layers\.1\.\S+; "):
            prune(model, nothing, spec)
    model.model.layers[0].mlp.down_proj.register_forward_hook(
        lambda module, args, output: output.masked_fill(torch.arange(len(output))[:, None, None] == 2, torch.nan))
    with pytest.raises(UserError, match=r"the loss of example 3 of calibration batch 1 is not finite"):
        prune(model, batches, spec)
    model, batches = _problem()
    model.model.layers[0].mlp.act_fn.register_full_backward_hook(lambda module, grads, _: (grads[0] * torch.inf,))
    with pytest.raises(UserError, match=r"layers\.0\.\S+: its weight or a gradient of it is not finite"):
        prune(model, batches, spec)


def test_a_linear_whose_gradient_would_be_wrong_is_named():
    spec = PruneConfig(method="obert", sparsity=0.5)
    model, batches = _problem()
    mlp = model.model.layers[1].mlp
    mlp.down_proj.register_forward_pre_hook(lambda module, args: args[0].transpose(0, 1))
    mlp.down_proj.register_forward_hook(lambda module, args, output: output.transpose(0, 1))
    with pytest.raises(UserError, match=r"down_proj multiplies positions \(\d+, 3\) where the batch has \(3, \d+\)"):
        prune(model, batches, spec)
    model, batches = _problem()
    mlp, seen = model.model.layers[1].mlp, []

    def overwrite(*_):
        seen[-1].detach().zero_()

    model.requires_grad_(False)  # autograd itself minds where a weight's gradient is asked for
    mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    mlp.register_forward_hook(overwrite)
    with pytest.raises(UserError, match=r"the block writes into what \S+down_proj has multiplied"):
        prune(model, batches, spec)


def test_a_block_that_is_singular_gets_ten_times_the_damping(caplog):
    model, batches = _problem()
    weights = prune(model, batches, PruneConfig(method="obert", sparsity=0.5, damping=1e-8))
    assert "blocks of its Fisher matrix are singular with damping 1e-08; they got up to" in caplog.text
    assert all(torch.isfinite(weight.values).all() for weight in weights.values())


def test_a_block_that_stays_singular_is_named():
    model, batches = _problem()
    spec = PruneConfig(method="obert", sparsity=0.5, damping=1e-20)
    with pytest.raises(UserError, match=r"layers\.1\.\S+: a block of its Fisher matrix is singular .* damping 1e-16"):
        prune(model, batches, spec)
