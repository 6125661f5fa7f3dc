"""The steps of a decoder between its products, against torch: every tier is as near to float64 as torch in float32."""

import pytest
import torch
from torch.nn import functional

from sparse_train import kernels
from sparse_train.kernels import ACTIVATIONS, Steps
from sparse_train.sparse import BitmaskTensor
from tests.training.plain import assert_as_exact

pytestmark = [pytest.mark.sanitize, pytest.mark.usefixtures("backend")]


def _random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _check(found, reference, *inputs, sizes=None):
    """`found` is as near to float64 as torch is in float32 (assert_as_exact)."""
    plain = reference(*inputs)
    assert torch.equal(found.isnan(), plain.isnan())
    exact = reference(*(None if tensor is None else tensor.double() for tensor in inputs))
    assert_as_exact(reference.__name__, found.nan_to_num(), plain.nan_to_num(), exact.nan_to_num(), sizes=sizes)


@pytest.mark.parametrize("is_rms", [True, False])
@pytest.mark.parametrize("width", [1, 7, 576])
def test_norms(width, is_rms):
    hidden, change, weight, bias = (_random(*shape, seed=seed) for seed, shape in
                                    enumerate([(3, width), (3, width), (width,), (width,)]))
    expected = hidden + change

    def norm(x, weight, bias):
        return (_rms_norm(x, weight) + (0 if bias is None else bias) if is_rms
                else functional.layer_norm(x, (width,), weight, bias, 1e-5))

    for extra in (None, bias):
        steps, out, own = Steps(), torch.empty(3, width), hidden.clone()
        steps.normalise(own, change, weight, extra, 1e-5, out, is_rms)
        steps.run()
        assert torch.equal(own, expected)
        _check(out, norm, expected, weight, extra)
    steps.normalise(own, None, weight, None, 1e-5, out, is_rms)
    steps.run()  # the first step adds the change again, the second none
    assert torch.equal(own, expected + change)


def _rms_norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    plain = {"silu": functional.silu, "gelu": functional.gelu, "relu": functional.relu}.get(
        name, lambda x: functional.gelu(x, approximate="tanh"))
    x = torch.cat([torch.linspace(-100, 100, 1003), _random(500) * 3, torch.tensor([0, -0.0, torch.nan, 1e30, -1e30])])
    factor, out = _random(len(x), seed=1), torch.empty(len(x))
    for given in (None, factor):
        steps = Steps()
        steps.activate(name, x, given, out)
        steps.run()

        def activation(x, factor):
            return plain(x) * (1 if factor is None else factor)

        # As parts of x: where an activation is nearly 0, torch rounds as coarsely.
        sizes = (x if given is None else x * given).double().abs().nan_to_num()
        _check(out, activation, x, given, sizes=sizes)


@pytest.mark.parametrize("heads, groups, dim, rotary", [(4, 4, 8, 8), (9, 3, 64, 0), (6, 2, 5, 4)])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_attention_over_a_cache(heads, groups, dim, rotary, has_bias, stored):
    """Two rows, of which one starts later, three tokens one after the other."""
    capacity, first, rows = 40, 20, 2
    keys, values = (_random(rows, groups, capacity, dim, seed=seed).to(stored) for seed in (1, 2))
    position, starts = torch.tensor([0]), torch.tensor([0, 7])
    angles = _random(capacity, rotary // 2, seed=3).repeat(1, 2)
    rotation = (angles.cos(), angles.sin()) if rotary else None
    bias = _random(heads, capacity, seed=4) if has_bias else None
    norms = (_random(dim, seed=5), _random(dim, seed=6)) if has_bias else None
    qkv, out = torch.empty(rows, (heads + 2 * groups) * dim), torch.empty(rows, heads * dim)
    q, k, v = qkv.split([heads * dim, groups * dim, groups * dim], dim=1)
    known = [(keys.to(dtype, copy=True), values.to(dtype, copy=True)) for dtype in (torch.float32, torch.float64)]
    steps = Steps()
    cache = Steps.key_cache(values).fill_(torch.nan)  # a block may begin before a text, and ends behind it
    Steps.put_keys(cache, keys[:, :, :first])
    steps.attend(q, k, v, out, cache, values, position, starts, 0.3, rotation, bias, norms, 1e-5)

    def turned(x, norm, place):
        x = x.view(-1, dim) if norm is None else _rms_norm(x.view(-1, dim), norm)
        if rotary:
            low, high = x[:, :rotary].chunk(2, dim=1)
            x = torch.cat([x[:, :rotary] * rotation[0][place] + torch.cat([-high, low], 1) * rotation[1][place],
                           x[:, rotary:]], 1)
        return x

    for token in range(3):
        place = position[0] = first + token
        qkv.copy_(_random(*qkv.shape, seed=10 + token))
        steps.run()
        expected = []
        for known_keys, known_values in known:
            parts = []
            for row, start in enumerate(starts.tolist()):
                key, query = (turned(part[row].to(known_keys.dtype), norm, place - start)
                              for part, norm in ((k, norms and norms[1]), (q, norms and norms[0])))
                if stored == torch.bfloat16:  # of numbers between two of its own either is near
                    found = cache[row, :, place // 16, :, place % 16].to(key.dtype)
                    assert ((found - key).abs() <= key.abs() * 2**-8).all()
                    key = found
                known_keys[row, :, place] = key
                known_values[row, :, place] = v[row].view(groups, dim).to(stored)
                for head in range(heads):
                    group = head // (heads // groups)
                    scores = known_keys[row, group, start:place + 1] @ query[head] * 0.3
                    if bias is not None:
                        scores = scores + bias[head, :place + 1 - start].flip(0)
                    parts.append(scores.softmax(0) @ known_values[row, group, start:place + 1])
            expected.append(torch.cat(parts).view(rows, -1))
        assert_as_exact("attention", out, *expected)
    again, alone = torch.empty_like(out), Steps()  # of what is there, as in cross-attention
    alone.attend(q, None, None, again, cache, values, position, starts, 0.3, rotation, bias, norms, 1e-5)
    alone.run()
    assert torch.equal(again, out)
    found = cache.transpose(3, 4).flatten(2, 3)[:, :, :first + 3]
    assert_as_exact("keys", found, known[0][0][:, :, :first + 3], known[1][0][:, :, :first + 3])
    assert torch.equal(values.float(), known[0][1])


@pytest.mark.parametrize("heads, groups", [(2, 2), (2, 1), (9, 3), (4, 1), (7, 1)])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_attention_over_many_positions_has_the_same_bits_alone_and_on_any_number_of_threads(heads, groups, stored):
    rows, capacity, last, dim = 3, 700, 690, 64
    keys, values = (_random(rows, groups, capacity, dim, seed=seed).to(stored) for seed in (1, 2))
    starts, q, out = torch.tensor([0, 5, 600]), _random(rows, heads * dim), torch.full((rows, heads * dim), torch.nan)

    def attended(q, keys, values, last, starts):
        steps, found, cache = Steps(), torch.full_like(q, torch.nan), Steps.key_cache(values)
        Steps.put_keys(cache, keys)
        steps.attend(q, None, None, found, cache, values, torch.tensor([last]), starts, 0.125)
        steps.run()
        return found

    def plain(q, keys, values):
        parts = [functional.scaled_dot_product_attention(
            q[row].view(1, heads, 1, dim), keys[row:row + 1, :, start:last + 1], values[row:row + 1, :, start:last + 1],
            scale=0.125, enable_gqa=True) for row, start in enumerate(starts.tolist())]
        return torch.cat(parts).view(rows, -1)

    num_threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found = attended(q, keys, values, last, starts)
            out = found if count == 1 else out
            assert torch.equal(found, out)
    finally:
        torch.set_num_threads(num_threads)
    _check(out, plain, q, keys.float(), values.float())
    for row, start in enumerate(starts.tolist()):
        for first in (0, 3):  # behind another number of paddings
            alone = (part[row:row + 1].roll(first - start, dims=2) for part in (keys, values))
            found = attended(q[row:row + 1], *alone, last + first - start, torch.tensor([first]))
            assert torch.equal(found, out[row:row + 1]), (row, first)


def test_a_row_that_attends_to_nothing_is_nan():
    values, q = _random(3, 2, 20, 8), _random(3, 16)
    cache, position = Steps.key_cache(values).zero_(), torch.tensor([9])
    for starts in ([0, 0, 0], [0, 10, 20], [10, 10, 10]):
        steps, out, first = Steps(), torch.ones_like(q), torch.tensor(starts)
        steps.attend(q, None, None, out, cache, values, position, first, 1.0)
        steps.run()
        assert torch.equal(out.isnan(), (first > 9)[:, None].expand_as(out)), starts


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("is_packed", [True, False])
def test_products(rows, is_packed):
    weight = BitmaskTensor.from_dense(_random(20, 70), _random(20, 70, seed=1) > 0)
    operand = kernels.PackedMatrix(weight.values, weight.bitmask, 70) if is_packed else weight.to_dense()
    x, bias, out = torch.empty(rows, 70), _random(20, seed=2), torch.empty(rows, 20)
    for extra in (None, bias):
        steps = Steps()
        steps.multiply(operand, extra, x, out)
        for seed in (3, 4):
            x.copy_(_random(rows, 70, seed=seed))
            steps.run()
            _check(out, functional.linear, x, weight.to_dense(), extra)
        x[-1, 3] = torch.inf
        steps.run()
        assert not out[-1].isfinite().any() and out[:-1].isfinite().all()


def test_what_does_not_fit_reaches_no_native_code():
    def row(*shape, **options):
        return torch.zeros(shape, **options)

    one, place = row(1, 8), row(1, dtype=torch.int64)
    cache = row(1, 2, 5, 4)
    keys = Steps.key_cache(cache)
    for call in (lambda s: s.normalise(one, row(1, 7), row(8), None, 1e-5, row(1, 8), True),
                 lambda s: s.normalise(one, None, row(8).double(), None, 1e-5, row(1, 8), True),
                 lambda s: s.normalise(row(8, 2).T, None, row(8), None, 1e-5, row(2, 8), True),
                 lambda s: s.activate("relu", one, row(8), row(1, 8)),
                 lambda s: s.multiply(row(3, 7), None, one, row(1, 3)),
                 lambda s: s.multiply(row(3, 8), None, one, row(1, 4)),
                 lambda s: s.attend(one, one, one, row(1, 12), keys, cache, place, place, 1.0),
                 lambda s: s.attend(one, one, None, row(1, 8), keys, cache, place, place, 1.0),
                 lambda s: s.attend(one, one, one, row(1, 8), cache, cache, place, place, 1.0),
                 lambda s: s.attend(one, one, one, row(1, 8), keys, cache, place, place.int(), 1.0),
                 lambda s: s.attend(one, one, one, row(1, 8), keys, cache.bfloat16(), place, place, 1.0),
                 lambda s: s.attend(one, one, one, row(1, 8), keys.half(), cache.half(), place, place, 1.0),
                 lambda s: s.attend(one, one, one, row(1, 8), keys, cache, place, place, 1.0, (row(5, 6), row(5, 6))),
                 lambda s: s.attend(one, row(1, 4), one, row(1, 8), keys, cache, place, place, 1.0)):
        with pytest.raises(ValueError):
            call(Steps())
