"""Compensated rounding against its definition, written out slowly in fp64, and what a whole model makes of it."""

import itertools

import pytest
import torch

from sparse_train import kernels
from sparse_train.compress import QUANTISERS, export_sparse, round_compensated, rounding
from sparse_train.compress.rounding import Rounding
from sparse_train.config import PruneConfig
from sparse_train.errors import UserError
from sparse_train.inference import load
from sparse_train.models import load_model, save_model
from sparse_train.pruning import Layer, prune
from sparse_train.pruning.statistics import Hessian
from sparse_train.sparse import BitmaskTensor, sparse_linears, sparsify
from sparse_train.tasks.batch import collate
from tests.models import tiny_examples, tiny_model

SPEC = PruneConfig(sparsity=0.5).levels[0]


def _problem(rows, columns, density=0.5, tokens=400):
    """(weight with zeros, keep, inputs): a few strong directions under noise, as activations are."""
    generator = torch.Generator().manual_seed(4)
    keep = torch.rand(rows, columns, generator=generator) < density
    strong = torch.randn(tokens, columns // 6, generator=generator) @ torch.randn(columns // 6, columns,
                                                                                  generator=generator)
    inputs = strong + 0.5 * torch.randn(tokens, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator) * keep, keep, inputs


def _statistics(inputs):
    statistics = Hessian(inputs.shape[1], inputs.device)
    statistics.add(inputs)
    return statistics


def _rounded(weight, keep, inputs, precision):
    """(rounded weight, codes (R, C), scale)."""
    method = Rounding(QUANTISERS[precision])
    result, kept = method.prune(Layer("weight", weight, SPEC, keep), _statistics(inputs))
    codes, scale = method.rounded["weight"]
    assert torch.equal(kept, keep) and torch.equal(codes.keep, keep) and not result[~keep].any()
    return result, codes.to_dense(), scale


def _steps(scale, num_columns):
    """(R, C): the scale of each position."""
    return scale[:, None].expand(-1, num_columns) if scale.ndim == 1 else kernels.scale_of_columns(scale, num_columns)


def _oracle(weight, keep, inputs, precision, num_refinements):
    """Codes (R, C), row by row and column by column; after each column the inverse of what is left of H is new."""
    _, scale = QUANTISERS[precision].nearest(BitmaskTensor.from_dense(weight, keep))
    lowest, highest = (-127, 127) if precision == "int8" else (-8, 7)
    num_rows, num_columns = weight.shape
    steps, inputs = _steps(scale, num_columns).double(), inputs.double()
    h = 2 * inputs.T @ inputs / len(inputs)
    h += torch.eye(num_columns) * SPEC.damping * h.diagonal().mean()
    inverses = [torch.linalg.inv(h[j:, j:]) for j in range(num_columns)]
    codes = torch.zeros(num_rows, num_columns, dtype=torch.float64)

    def nearest(row, j, value):
        return (value / steps[row, j]).round().clamp(lowest, highest) if keep[row, j] else 0.0

    for row in range(num_rows):
        left = weight[row].double().clone()
        for j in range(num_columns):
            codes[row, j] = nearest(row, j, left[j])
            left[j:] -= (left[j] - codes[row, j] * steps[row, j]) / inverses[j][0, 0] * inverses[j][0]
        for _ in range(num_refinements):
            for j in range(num_columns):
                error = weight[row].double() - codes[row] * steps[row]
                codes[row, j] = nearest(row, j, codes[row, j] * steps[row, j] + h[j] @ error / h[j, j])
    return codes


@pytest.mark.parametrize("precision", list(QUANTISERS))
@pytest.mark.parametrize("num_refinements", [0, 2])
def test_it_is_its_definition(precision, num_refinements, monkeypatch):
    monkeypatch.setattr(rounding, "_NUM_REFINEMENTS", num_refinements)
    monkeypatch.setattr(rounding, "_WIDTH", 64)
    weight, keep, inputs = _problem(2, 150)
    result, codes, scale = _rounded(weight, keep, inputs, precision)
    assert torch.equal(codes.double(), _oracle(weight, keep, inputs, precision, num_refinements))
    torch.testing.assert_close(result, codes * _steps(scale, 150))


@pytest.mark.parametrize("precision", list(QUANTISERS))
@pytest.mark.parametrize("density", [0.25, 0.5, 1.0])
def test_the_layers_error_is_a_fraction_of_that_of_nearest(precision, density, monkeypatch):
    """Also on inputs that calibration did not see, and every refinement helps."""
    weight, keep, inputs = _problem(32, 192, density, tokens=2000)
    seen, unseen = inputs.chunk(2)
    codes, scale = QUANTISERS[precision].nearest(BitmaskTensor.from_dense(weight, keep))
    nearest = (codes.to_dense() * _steps(scale, 192) - weight) @ unseen.T
    h = _statistics(seen).mean() + torch.eye(192) * SPEC.damping * _statistics(seen).mean().diagonal().mean()
    losses = []
    for count in (0, 1, 2, 3):
        monkeypatch.setattr(rounding, "_NUM_REFINEMENTS", count)
        error = _rounded(weight, keep, seen, precision)[0] - weight
        losses.append(((error @ h) * error).sum(1))
    assert all((after <= before * 1.0001).all() for before, after in itertools.pairwise(losses))
    assert losses[3].sum() < 0.95 * losses[0].sum()
    assert (error @ unseen.T).norm() < 0.7 * nearest.norm()


def test_inputs_that_never_fire_are_rounded_to_nearest():
    weight, keep, inputs = _problem(8, 64)
    keep[:, 5], inputs[:, 5] = True, 0
    weight[:, 5] = torch.linspace(-1, 1, 8)
    _, codes, scale = _rounded(weight, keep, inputs, "int8")
    assert torch.equal(codes[:, 5], (weight[:, 5] / scale).round().char())


def _pruned(family):
    model, processor = tiny_model(family)
    sparsify(model, prune(model, [], PruneConfig(method="magnitude", sparsity=0.5)))
    return model, processor


def _batches(processor):
    return [collate(tiny_examples(processor)[start:start + 2], processor) for start in (0, 2)]


@pytest.mark.parametrize("family", ["mpt", "llama", "t5"])
@pytest.mark.parametrize("precision", list(QUANTISERS))
def test_a_folder_keeps_its_bits_and_answers(family, precision, tmp_path):
    model, processor = _pruned(family)
    save_model(tmp_path / "sparse", model, processor)
    before = {name: linear.weight for name, linear in sparse_linears(model).items()}
    found = []
    rounded = round_compensated(load_model(tmp_path / "sparse"), _batches(processor), precision, SPEC.damping,
                                lambda done, total: found.append((done, total)))
    assert rounded.keys() == before.keys() and found[-1][0] == found[-1][1]
    again = round_compensated(load_model(tmp_path / "sparse"), _batches(processor), precision, SPEC.damping)
    for name, (codes, scale) in rounded.items():
        nearest, expected = QUANTISERS[precision].nearest(before[name])
        assert torch.equal(codes.bitmask, before[name].bitmask) and torch.equal(scale, expected), name
        assert torch.equal(codes.values, again[name][0].values), name
        assert not torch.equal(codes.values, nearest.values), name
    export_sparse(model, processor, precision, tmp_path / "rounded", int8_head=True, rounded=rounded)
    runtime = load(tmp_path / "rounded")
    modules = dict(runtime.model.named_modules())
    for name, (codes, scale) in rounded.items():
        expected = codes.to_dense() * _steps(scale, codes.shape[1])
        torch.testing.assert_close(modules[name].weight.to_dense(), expected)
    head = model.get_output_embeddings().weight.detach()  # to nearest
    assert ((modules["lm_head"].weight.to_dense() - head).abs() <= head.abs().amax(1, keepdim=True) / 127 * 0.51).all()
    assert runtime.precision == precision and len(runtime.complete("Say one", 5)) > 0


def test_a_block_sees_the_inputs_that_the_rounded_blocks_before_it_make(tmp_path):
    model, processor = _pruned("llama")
    save_model(tmp_path, model, processor)
    rounded = round_compensated(load_model(tmp_path), _batches(processor), "int4", SPEC.damping)
    name, blocks = "model.layers.1.self_attn.q_proj", load_model(tmp_path)
    for other, linear in sparse_linears(blocks).items():
        if "layers.0." in other:
            codes, scale = rounded[other]
            linear.values.data = (codes.to_dense() * _steps(scale, codes.shape[1]))[codes.keep]
    found = []
    blocks.get_submodule(name).register_forward_pre_hook(lambda module, args: found.append(args[0]))
    for batch in _batches(processor):
        with torch.no_grad():
            blocks(**batch.inputs())
        found[-1] = found[-1][batch.attend]
    weight = blocks.get_submodule(name).weight
    _, codes, _ = _rounded(weight.to_dense(), weight.keep, torch.cat(found), "int4")
    assert torch.equal(codes, rounded[name][0].to_dense())


def test_without_a_token_it_is_refused():
    model, _ = _pruned("mpt")
    with pytest.raises(UserError, match=r"no calibration token reached transformer\.blocks\.0.*; give more .*, or use "
                                        r"compress\.rounding=nearest$"):
        round_compensated(model, [], "int8", SPEC.damping)
