"""SparseLinear against nn.Linear with masked weights: outputs, gradients, and the way into a model and out of it."""

import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional

from sparse_train.sparse import BitmaskTensor, SparseLinear, densify, sparse_linears, sparsify


def _pair(rows=5, columns=70, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    linear = nn.Linear(columns, rows, bias, dtype=dtype)
    keep = torch.rand(rows, columns) < 0.3
    keep[1] = False  # an empty row
    return linear, keep, SparseLinear(BitmaskTensor.from_dense(linear.weight.detach(), keep), linear.bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(4,), (2, 3), (1, 1), ()])
def test_forward_and_gradients_are_those_of_the_masked_linear(lead, bias):
    linear, keep, sparse = _pair(bias=bias)
    x, y = (torch.randn(*lead, 70).requires_grad_() for _ in range(2))
    y.data = x.data.clone()
    weight = (linear.weight.detach() * keep).requires_grad_()
    out, expected = sparse(x), functional.linear(y, weight, linear.bias)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(sparse.values.grad, weight.grad[keep])
    if bias:
        torch.testing.assert_close(sparse.bias.grad, linear.bias.grad)


def test_gradients_by_finite_differences():
    _, _, sparse = _pair(rows=3, columns=9, dtype=torch.float64)
    x = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, values: torch.func.functional_call(sparse, {"values": values}, x), (x, sparse.values))


def test_bf16_matches_the_masked_linear_in_bf16():
    linear, keep, sparse = _pair(dtype=torch.bfloat16)
    x = torch.randn(4, 70, dtype=torch.bfloat16)
    torch.testing.assert_close(sparse(x), functional.linear(x, linear.weight * keep, linear.bias), rtol=1e-2, atol=1e-2)


def test_only_the_kept_values_and_the_input_are_saved_for_backward():
    _, _, sparse = _pair(rows=64, columns=640)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        sparse(torch.randn(2, 640))
    assert max(saved) <= sparse.values.numel(), "a dense weight was kept alive until backward"


def test_sparsify_and_densify_are_inverse(monkeypatch):
    model = nn.Sequential(nn.Linear(70, 5), nn.ReLU(), nn.Linear(5, 3))
    weights = {name: BitmaskTensor.from_dense(model.get_submodule(name).weight.detach(),
                                              torch.rand(model.get_submodule(name).weight.shape) < 0.5)
               for name in ("0", "2")}
    bias = model[0].bias.detach().clone()
    assert list(sparse_linears(sparsify(model, weights))) == ["0", "2"]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {"0.values", "0.bias", "2.values", "2.bias"}
    layers, alive, to_dense = list(map(weakref.ref, sparse_linears(model).values())), [], BitmaskTensor.to_dense
    monkeypatch.setattr(BitmaskTensor, "to_dense", lambda weight: (
        alive.append(sum(layer() is not None for layer in layers)), to_dense(weight))[1])
    densify(model)
    assert alive == [2, 1]  # no two models are held
    assert not sparse_linears(model) and torch.equal(model[0].bias, bias)
    assert torch.equal(model[2].weight, weights["2"].to_dense())


def test_a_weight_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="has shape"):
        sparsify(nn.Sequential(nn.Linear(4, 3)), {"0": BitmaskTensor.from_dense(torch.ones(4, 3))})
