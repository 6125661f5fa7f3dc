"""A decoder's steps on a GPU against float64: compiled there, without one interpreted on tensors in CPU memory."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from sparse_train.kernels import ACTIVATIONS
from sparse_train.kernels.cuda_graph import CudaGraph
from sparse_train.sparse import BitmaskTensor
from tests.training.plain import assert_as_exact

DeviceMatrix = pytest.importorskip("sparse_train.kernels.triton_matrix").DeviceMatrix
triton_steps = pytest.importorskip("sparse_train.kernels.triton_steps")
_HAS_GPU = torch.cuda.is_available()
_EACH_DEVICE = pytest.mark.parametrize("device", [
    pytest.param("cpu", marks=pytest.mark.skipif(_HAS_GPU, reason="Triton compiles its kernels for the GPU instead")),
    pytest.param("cuda", marks=[pytest.mark.gpu,
                                pytest.mark.skipif(not _HAS_GPU, reason="needs a CUDA device; torch sees none")])])
_ROUNDING = 2.0**-7  # of one BF16 number, which the interpreter cuts off


def _random(*shape, seed=0, device="cpu", dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def _steps(device):
    return triton_steps.GraphSteps(torch.device(device))


def _rms_norm(x, weight, epsilon=1e-5):
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


def _assert_close(found, exact, dtype):
    if dtype == torch.bfloat16:
        assert torch.allclose(found.double(), exact, rtol=_ROUNDING, atol=_ROUNDING * float(exact.abs().max()))
    else:
        assert torch.allclose(found.double(), exact, rtol=1e-5, atol=1e-6 * float(exact.abs().max()))


@_EACH_DEVICE
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_rms", [True, False])
def test_norms(is_rms, dtype, device):
    for width in (1, 7, 576):
        hidden, change, weight, bias = (_random(*shape, seed=seed, device=device, dtype=dtype) for seed, shape in
                                        enumerate([(3, width), (3, width), (width,), (width,)]))
        for given, extra in ((change, None), (None, bias)):
            own, out, steps = hidden.clone(), torch.full_like(hidden, torch.nan), _steps(device)
            steps.normalise(own, given, weight, extra, 1e-5, out, is_rms)
            steps.run()
            _assert_close(own, (hidden.double() + (0 if given is None else given.double())), dtype)
            exact = (_rms_norm(own.double(), weight.double()) if is_rms else
                     functional.layer_norm(own.double(), (width,), weight.double(), None, 1e-5))
            _assert_close(out, exact if extra is None else exact + extra.double(), dtype)


@_EACH_DEVICE
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name, device):
    plain = {"silu": functional.silu, "gelu": functional.gelu, "relu": functional.relu}.get(
        name, lambda x: functional.gelu(x, approximate="tanh"))
    x = torch.cat([torch.linspace(-40, 40, 1003), _random(500) * 3, torch.tensor([0, -0.0, torch.nan])]).to(device)
    factor, out = _random(len(x), seed=1, device=device), torch.empty(len(x), device=device)
    for given in (None, factor):
        steps = _steps(device)
        steps.activate(name, x, given, out)
        steps.run()
        exact = plain(x.double()) * (1 if given is None else given.double())
        assert torch.equal(out.isnan(), exact.isnan())
        assert torch.allclose(out.double(), exact, rtol=1e-5, atol=1e-5, equal_nan=True)


@_EACH_DEVICE
@pytest.mark.parametrize("heads, groups, dim, rotary, has_more, dtype", [
    (2, 2, 8, 8, False, torch.float32), (3, 1, 5, 4, True, torch.bfloat16),
    pytest.param(9, 3, 20, 0, True, torch.float32, marks=pytest.mark.slow),
    pytest.param(32, 8, 128, 128, False, torch.bfloat16, marks=pytest.mark.skipif(
        not _HAS_GPU, reason="an 8B Llama's heads, which take minutes where they are interpreted"))])
def test_attention_over_a_cache(heads, groups, dim, rotary, has_more, dtype, device, monkeypatch):
    """Two rows, of which one starts later, two tokens one after the other, over one part of the text or several, of
    which the last is empty, and the first of one row. Behind the text, memory is not read."""
    is_large, rows = dim == 128, 2
    capacity, first, late = (768, 500, 300) if is_large else (40, 14, 13)
    angles = _random(capacity, rotary // 2, seed=3).repeat(1, 2)
    rotation = tuple(part.to(device, dtype) for part in (angles.cos(), angles.sin())) if rotary else None
    bias = _random(heads, capacity, seed=4, device=device) if has_more else None
    norms = tuple(_random(dim, seed=seed, device=device, dtype=dtype) for seed in (5, 6)) if has_more else None
    for span in (256,) if is_large else (256, 12):
        monkeypatch.setattr(triton_steps, "_SPAN", span)
        if not is_large:
            monkeypatch.setattr(triton_steps, "_SCORES", 16)
        keys, values = (_random(rows, groups, capacity, dim, seed=seed, device=device, dtype=dtype) for seed in (1, 2))
        keys[:, :, first:] = values[:, :, first:] = torch.nan
        known = [keys.double(), values.double()]
        position, starts = (torch.tensor(places, device=device) for places in ([0], [0, late]))
        qkv = torch.empty(rows, (heads + 2 * groups) * dim, device=device, dtype=dtype)
        out = qkv.new_full((rows, heads * dim), torch.nan)
        q, k, v = qkv.split([heads * dim, groups * dim, groups * dim], dim=1)
        steps = _steps(device)
        steps.attend(q, k, v, out, keys, values, position, starts, 0.3, rotation, bias, norms, 1e-5)

        def turned(x, norm, place, dim=dim):
            x = x.double().view(-1, dim) if norm is None else _rms_norm(x.double().view(-1, dim), norm.double())
            if rotary:
                low, high = x[:, :rotary].chunk(2, dim=1)
                cosine, sine = (part[place].double() for part in rotation)
                x = torch.cat([x[:, :rotary] * cosine + torch.cat([-high, low], 1) * sine, x[:, rotary:]], 1)
            return x

        for token in range(2):
            place = first + token
            position.fill_(place)
            qkv.copy_(_random(*qkv.shape, seed=10 + token))
            steps.run()
            exact = torch.empty(out.shape, dtype=torch.float64, device=device)
            for row, start in enumerate(starts.tolist()):
                key, query = (turned(part[row], norm, place - start)
                              for part, norm in ((k, norms and norms[1]), (q, norms and norms[0])))
                _assert_close(keys[row, :, place], key, dtype)
                known[0][row, :, place], known[1][row, :, place] = keys[row, :, place], v[row].view(groups, dim)
                for head in range(heads):
                    group = head // (heads // groups)
                    scores = known[0][row, group, start:place + 1] @ query[head] * 0.3
                    if bias is not None:
                        scores = scores + bias[head, :place + 1 - start].double().flip(0)
                    exact[row, head * dim:(head + 1) * dim] = scores.softmax(0) @ known[1][row, group, start:place + 1]
            _assert_close(out, exact, dtype)
        for cached, exactly in zip((keys, values), known, strict=True):
            assert torch.equal(cached[:, :, :first + 2].double(), exactly[:, :, :first + 2])
        assert keys[:, :, first + 2:].isnan().all() and values[:, :, first + 2:].isnan().all()
        again, alone = torch.full_like(out, torch.nan), _steps(device)  # of what is there, as in cross-attention
        alone.attend(q, None, None, again, keys, values, position, starts, 0.3, rotation, bias, norms, 1e-5)
        alone.run()
        _assert_close(again, exact, dtype)


@_EACH_DEVICE
@pytest.mark.parametrize("num_rows", [2, 17])
def test_products(num_rows, device):
    """Of looked-up rows with dense and packed weights, which are expanded for more than 16."""
    weight = BitmaskTensor.from_dense(_random(20, 70), _random(20, 70, seed=1) > 0)
    weight = BitmaskTensor(weight.values.to(device, torch.bfloat16), weight.bitmask.to(device), weight.shape)
    x, bias = (_random(*shape, seed=2, device=device, dtype=torch.bfloat16) for shape in ((num_rows, 70), (20,)))
    table = _random(9, 70, seed=3, device=device, dtype=torch.bfloat16)
    tokens = torch.arange(num_rows, device=device) * 8 % 9
    for operand in (weight.to_dense(), DeviceMatrix(weight.values, weight.bitmask, 70)):
        for extra in (None, bias):
            out, steps = x.new_full((num_rows, 20), torch.nan), _steps(device)
            steps.embed(table, tokens, x)
            steps.multiply(operand, extra, x, out)
            steps.run()
            assert torch.equal(x, table[tokens])
            exact = x.double() @ weight.to_dense().double().T
            _assert_close(out, exact if extra is None else exact + extra.double(), torch.bfloat16)


def test_tensors_that_a_step_would_misread_are_refused():
    steps, square, cache = _steps("cpu"), torch.zeros(4, 4), torch.zeros(2, 1, 8, 4)
    position, starts, qkv, out = torch.zeros(1).long(), torch.zeros(2).long(), torch.zeros(2, 12), torch.zeros(2, 4)
    q, k, v = qkv.chunk(3, dim=1)
    for call in (lambda: steps.normalise(square.T[:2], None, square[0], None, 1e-5, out, True),
                 lambda: steps.normalise(square, None, square[:, 0], None, 1e-5, square, True),
                 lambda: steps.activate("silu", square, square[:2], square),
                 lambda: steps.multiply(square, None, out, square[:1]),
                 lambda: steps.attend(q, k, v.clone(), out, cache, cache, position, starts, 1.0),
                 lambda: steps.attend(q, k, v, out, cache[:, :, :4], cache, position, starts, 1.0),
                 lambda: steps.attend(q, k, v, out, cache, cache, position, starts.int(), 1.0),
                 lambda: steps.attend(q, k, v, out, cache, cache, position, starts, 1.0, (square, square))):
        with pytest.raises(ValueError, match=r"a tensor of a step is|both must be alike"):
            call()


def test_launches_are_warmed_up_captured_and_then_replayed(monkeypatch):
    told = []

    @contextlib.contextmanager
    def between(begin, end):
        told.append(begin)
        yield
        told.append(end)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: told.append("replay")))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: between("begin", "end"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: between(f"to {device}", "back"))
    graph = CudaGraph(lambda: told.append("launch"), torch.device("cuda", 1))
    for _ in range(3):
        graph()
    assert told == ["to cuda:1", "launch", "back", "to cuda:1", "begin", "launch", "end", "replay", "back",
                    "to cuda:1", "replay", "back"]


@pytest.mark.gpu
@pytest.mark.skipif(not _HAS_GPU, reason="needs a CUDA device; torch sees none")
def test_a_graph_repeats_its_launches():
    """Run by run: warm, captured, replayed; on what memory holds by then."""
    steps, x = _steps("cuda"), torch.zeros(1, 64, device="cuda")
    weight, out = _random(8, 64, device="cuda"), torch.empty(1, 8, device="cuda")
    steps.add(lambda: x.add_(1))
    steps.multiply(weight, None, x, out)
    for number in range(1, 5):
        steps.run()
        assert_as_exact("the product", out, x @ weight.T, x.double() @ weight.double().T)
        assert float(x[0, 0]) == number
