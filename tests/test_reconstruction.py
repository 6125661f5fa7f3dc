"""Block reconstruction against the definition: what a step does to a value, what stays as it is, and that it helps."""

import logging

import pytest
import torch
from torch import nn

from sparse_train.config import PruneConfig
from sparse_train.config.pruning import ReconstructionConfig
from sparse_train.errors import UserError
from sparse_train.models import family_of
from sparse_train.pruning import prune
from sparse_train.pruning.reconstruction import Reconstruction
from sparse_train.sparse import BitmaskTensor
from sparse_train.tasks.batch import collate
from tests.models import tiny_examples, tiny_model


def _batches(processor):
    examples = tiny_examples(processor)
    return [collate(examples[start:start + 2], processor) for start in (0, 2)]


def _outputs(model, batches):
    """Of the first block, at real tokens (N, D), in float64; its inputs are the embeddings."""
    block, seen = next(iter(family_of(model).blocks(model).values())), []
    handle = block.register_forward_hook(lambda module, args, output: seen.append(
        output[0] if isinstance(output, tuple) else output))
    for batch in batches:
        model(**batch.inputs(), use_cache=False)
    handle.remove()
    return [states[batch.attends["decoder"]] for states, batch in zip(seen, batches, strict=True)]


def _error(model, targets, batches):
    outputs = _outputs(model, batches)
    return sum((s - t).square().sum() for s, t in zip(outputs, targets, strict=True)) / sum(
        t.square().sum() for t in targets)


def _pruned(batches, family="llama", **keys):
    model, _ = tiny_model(family)
    untouched = {name: parameter.clone() for name, parameter in model.named_parameters()}
    weights = prune(model, batches, PruneConfig(**keys))
    for name, parameter in model.named_parameters():
        linear = name.removesuffix(".weight")
        expected = weights[linear].to_dense() if linear in weights else untouched[name]
        assert torch.equal(parameter, expected), name
    first = next(iter(family_of(model).blocks(model)))
    return model.double(), {name: weight for name, weight in weights.items() if name.startswith(f"{first}.")}


@pytest.mark.parametrize("keys", [{"method": "magnitude", "sparsity": 0.7}, {"method": "sparsegpt", "pattern": "2:4"},
                                  {"method": "wanda", "sparsity": 0.5, "family": "mpt"}], ids=str)
def test_the_error_falls_and_the_bits_stay(keys):
    dense, processor = tiny_model(keys.get("family", "llama"))
    batches = _batches(processor)
    with torch.no_grad():
        targets = _outputs(dense.double(), batches)
        plain, bits = _pruned(batches, **keys)
        trained, kept = _pruned(batches, reconstruction={"steps": 40, "learning_rate": 1e-2}, **keys)
        assert _error(trained, targets, batches) < 0.5 * _error(plain, targets, batches)
    assert all(torch.equal(weight.bitmask, bits[name].bitmask) for name, weight in kept.items())


def test_a_step_is_one_of_adam_on_the_first_batch():
    """Of Adam with a gradient g, the first step is the learning rate times g / (|g| + 1e-8)."""
    dense, processor = tiny_model("llama")
    batches = _batches(processor)
    (target,) = _outputs(dense.double(), batches[:1])
    plain, before = _pruned(batches, method="magnitude", sparsity=0.5)
    _, after = _pruned(batches, method="magnitude", sparsity=0.5,
                       reconstruction={"steps": 1, "learning_rate": 1e-5})
    _error(plain, [target.detach()], batches[:1]).backward()
    for name, weight in after.items():
        gradient = plain.get_parameter(f"{name}.weight").grad[weight.keep]
        step = -1e-5 * gradient / (gradient.abs() + 1e-8)
        moved = weight.values.double() - before[name].values.double()
        assert (moved - step).abs().max() < 1e-6, name


def test_values_that_training_makes_worse_stay_those_of_pruning(caplog):
    batches = _batches(tiny_model("llama")[1])
    _, before = _pruned(batches, sparsity=0.5)
    with caplog.at_level(logging.WARNING):
        _, after = _pruned(batches, sparsity=0.5, reconstruction={"steps": 3, "learning_rate": 10.0})
    assert "model.layers.0: reconstruction would raise its error" in caplog.text
    assert all(torch.equal(weight.values, before[name].values) for name, weight in after.items())


def test_values_without_a_gradient_and_blocks_without_an_error_are_left_alone(caplog):
    """A block may use a linear for some inputs only."""
    model, x = nn.ModuleDict({"used": nn.Linear(4, 4), "other": nn.Linear(4, 4)}), torch.randn(3, 4)
    for threshold, moves in ((0.0, False), (0.25, True)):
        keep = {name: linear.weight.detach().abs() >= threshold for name, linear in model.items()}
        weights = {name: BitmaskTensor.from_dense(model[name].weight.detach(), keep[name]) for name in keep}
        found = Reconstruction("block", lambda: iter([model["used"](x)])).fit(
            model, weights, ReconstructionConfig(steps=5))
        assert torch.equal(found["other"].values, weights["other"].values)
        assert torch.equal(found["used"].values, weights["used"].values) != moves
    assert not caplog.records


def test_without_a_token_there_is_nothing_to_compare():
    with pytest.raises(UserError, match=r"no calibration token reached model\.layers\.0"):
        _pruned([], method="magnitude", sparsity=0.5, reconstruction={"steps": 1})
