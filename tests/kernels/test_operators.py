"""The kernels as operators of torch: what torch itself checks of one, and whole layers under torch.compile."""

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch._dynamo.backends.common import aot_autograd
from torch.library import opcheck

from sparse_train import kernels
from sparse_train.inference import PackedLinear
from sparse_train.kernels.devices import kernels_for
from sparse_train.sparse import BitmaskTensor, SparseLinear

_OPS = torch.ops.sparse_train


def _weight(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return BitmaskTensor.from_dense(torch.randn(20, 70, generator=generator).to(dtype),
                                    torch.rand(20, 70, generator=generator) < 0.3)


def _packed():
    weight = _weight()
    return kernels.PackedMatrix(weight.values, weight.bitmask, 70)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # native code, and the reference
def test_torch_finds_the_operators_sound(dtype):
    weight = _weight(dtype)
    values, bitmask, nnz = weight.values, weight.bitmask, weight.values.numel()
    x, grad_y = torch.randn(2, 3, 70, dtype=dtype), torch.randn(2, 3, 20, dtype=dtype)
    opcheck(_OPS.expand.default, (values.requires_grad_(), bitmask, 70))
    opcheck(_OPS.compact.default, (weight.to_dense().detach().requires_grad_(), bitmask, nnz))
    opcheck(_OPS.linear.default, (x.requires_grad_(), values, bitmask))
    x, values = x.detach(), values.detach()
    opcheck(_OPS.linear_grad_x.default, (grad_y, values, bitmask, 70))
    opcheck(_OPS.linear_grad_values.default, (grad_y, x, bitmask, nnz))


def test_torch_finds_the_packed_operators_sound():
    packed = _packed()
    opcheck(_OPS.matvec.default, (packed._number, torch.randn(70), 20))
    opcheck(_OPS.matmul.default, (packed._number, torch.randn(4, 70), 20))


def test_expand_and_compact_are_each_others_gradient():
    weight = _weight(torch.float64)
    values, dense = weight.values.requires_grad_(), torch.randn(20, 70, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: kernels.expand(v, weight.bitmask, 70), values)
    assert torch.autograd.gradcheck(lambda d: kernels.compact(d, weight.bitmask, weight.values.numel()), dense)


@pytest.mark.parametrize("lead", [(4,), (2, 3)])
def test_a_sparse_layer_compiles_whole_and_trains_to_the_same_bits(lead):
    layer = SparseLinear(_weight(), torch.randn(20))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    found = []
    for forward in (layer, compiled):
        x = torch.randn(*lead, 70, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = forward(x)
        y.square().sum().backward()
        found.append((y.detach(), x.grad, layer.values.grad, layer.bias.grad))
        layer.zero_grad()
    for eager, whole in zip(*found, strict=True):
        assert torch.equal(eager, whole)


def test_a_compiler_that_chooses_what_to_keep_keeps_no_dense_weight():
    kept = []

    def forward_compiler(graph, inputs):
        (output,) = graph.graph.find_nodes(op="output")
        kept.extend(node.meta["val"].numel() for node in output.args[0] if hasattr(node.meta.get("val"), "numel"))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=forward_compiler, bw_compiler=lambda graph, inputs: make_boxed_func(
        graph.forward), partition_fn=min_cut_rematerialization_partition)
    torch.compile(SparseLinear(_weight()), fullgraph=True, backend=backend)(torch.randn(2, 70)).sum().backward()
    assert kept and max(kept) < 20 * 70


@pytest.mark.parametrize("lead", [(1, 1), (3, 1), (2, 5)])  # a token, a batch's step, prompts
def test_a_packed_layer_compiles_whole(lead):
    layers = [PackedLinear(_packed(), torch.randn(20)) for _ in range(2)]
    x = torch.randn(*lead, 70)
    with torch.no_grad():
        for layer in layers:  # the same code twice: the second is another weight
            assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


def test_a_matrix_that_is_gone_is_met_by_no_other():
    number = _packed()._number
    with pytest.raises(KeyError):
        _OPS.matvec(number, torch.randn(70), 20)
    assert _packed()._number > number


def test_autocast_multiplies_and_trains_in_its_dtype():
    layer = SparseLinear(_weight())
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(2, 70))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert layer.values.grad.dtype == torch.float32


def test_what_no_device_kernel_moves_takes_the_reference():
    moved = {dtype: kernels_for(torch.empty(1, dtype=dtype)).expand is not kernels.reference.expand
             for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float64, torch.int32)}
    assert moved == {dtype: dtype not in (torch.float64, torch.int32) for dtype in moved}
    assert kernels_for(torch.empty(1, device="meta")).expand is kernels.reference.expand
