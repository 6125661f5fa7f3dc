"""Native kernels against float64 and against the torch reference, at shapes that end in the middle of everything."""

import ctypes
import mmap

import pytest
import torch

from sparse_train import kernels
from sparse_train.kernels import reference

_SHAPES = [(1, 1), (3, 63), (17, 64), (5, 65), (64, 127), (130, 200), (2, 1000), (257, 512)]
_DENSITIES = [0.0, 0.1, 0.5, 1.0]


@pytest.fixture(params=["portable", "avx512"])
def backend(request):
    try:
        with kernels.use_backend(request.param):
            yield request.param
    except ValueError as error:
        pytest.skip(str(error))


def _weight(shape, density, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(shape, generator=generator) < density
    dense = torch.randn(shape, generator=generator)
    dense = (dense * 40).round().clamp(-127, 127).to(dtype) if dtype == torch.int8 else dense.to(dtype)
    return torch.where(keep, dense, torch.zeros((), dtype=dtype)), keep


@pytest.mark.parametrize("shape", _SHAPES)
def test_pack_and_unpack(shape):
    _, keep = _weight(shape, 0.4)
    bits = kernels.pack(keep)
    assert bits.shape == (shape[0], 8 * -(-shape[1] // 64))
    assert torch.equal(kernels.unpack(bits, shape[1]), keep)
    for row, column in [(0, 0), (shape[0] - 1, shape[1] - 1)]:
        assert bool(bits[row, column // 8] >> (column % 8) & 1) == bool(keep[row, column])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("density", _DENSITIES)
@pytest.mark.parametrize("shape", _SHAPES)
def test_expand_and_compact_move_every_bit(backend, shape, density, dtype):
    dense, keep = _weight(shape, density, dtype)
    bits, values = kernels.pack(keep), dense[keep]
    assert torch.equal(kernels.expand(values, bits, shape[1]), dense)
    assert torch.equal(kernels.compact(dense, bits), values)
    assert torch.equal(reference.expand(values, bits, shape[1]), dense)
    assert torch.equal(reference.compact(dense, bits), values)


@pytest.mark.parametrize("density", [0.1, 0.6])
def test_a_weight_larger_than_the_caches_and_given_targets(backend, density):
    dense, keep = _weight((4096, 1088), density)
    bits, values = kernels.pack(keep), dense[keep]
    expanded, compacted = torch.full_like(dense, 7), torch.full_like(values, 7)
    assert kernels.expand(values, bits, 1088, out=expanded) is expanded and torch.equal(expanded, dense)
    assert kernels.compact(dense, bits, out=compacted) is compacted and torch.equal(compacted, values)
    with pytest.raises(ValueError, match="out is"):
        kernels.expand(values, bits, 1088, out=expanded.t())
    with pytest.raises(ValueError, match="positions, but there are"):
        kernels.compact(dense, bits, out=compacted[:-1])


def test_odd_values_survive(backend):
    keep = torch.ones(2, 70, dtype=torch.bool)
    dense = torch.tensor([float("nan"), -0.0, float("inf"), 1e-42]).repeat(35).view(2, 70)
    bits = kernels.pack(keep)
    assert torch.equal(kernels.compact(dense, bits).view(torch.int32), dense.flatten().view(torch.int32))
    assert torch.equal(kernels.expand(dense.flatten(), bits, 70).view(torch.int32), dense.view(torch.int32))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("density", _DENSITIES)
@pytest.mark.parametrize("shape", [*_SHAPES, (1024, 384)])
def test_fp32_matvec_is_as_exact_as_torch(backend, shape, density, threads):
    dense, keep = _weight(shape, density)
    x = torch.randn(shape[1], generator=torch.Generator().manual_seed(1))
    exact = dense.double() @ x.double()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = kernels.PackedMatrix(dense[keep], kernels.pack(keep), shape[1]).matvec(x)
    finally:
        torch.set_num_threads(before)
    bound = 2 * (dense @ x - exact).abs().max() + 1e-6 * (dense.double().abs() @ x.double().abs()).max() + 1e-12
    assert (y - exact).abs().max() <= bound


@pytest.mark.parametrize("density", _DENSITIES)
@pytest.mark.parametrize("shape", [*_SHAPES, (1024, 384)])
def test_int8_matvec_is_the_integer_product(backend, shape, density):
    codes, keep = _weight(shape, density, torch.int8)
    scale = torch.rand(shape[0]) + 0.1
    x = torch.randn(shape[1], generator=torch.Generator().manual_seed(1))
    packed = kernels.PackedMatrix(codes[keep], kernels.pack(keep), shape[1], scale)
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    step = (high - low) / 255
    inverse = 1 / step
    zero = (-low * inverse).round()
    x_codes = ((x * inverse).round() + zero).clamp(0, 255)
    sums = codes.double() @ (x_codes - zero).double()
    torch.testing.assert_close(packed.matvec(x), (scale.double() * step.double() * sums).float(), rtol=1e-6, atol=0)


def test_to_dense_is_what_matvec_multiplies_with(backend):
    codes, keep = _weight((40, 100), 0.3, torch.int8)
    scale = torch.rand(40)
    packed = kernels.PackedMatrix(codes[keep], kernels.pack(keep), 100, scale)
    assert torch.equal(packed.to_dense(), codes * scale[:, None])


def test_bytes_are_values_and_bits():
    dense, keep = _weight((64, 256), 0.25)
    packed = kernels.PackedMatrix(dense[keep], kernels.pack(keep), 256)
    assert packed.num_bytes == 4 * int(keep.sum()) + 64 * 256 // 8


def test_threads_agree_to_the_bit(backend):
    dense, keep = _weight((2048, 512), 0.3)
    packed = kernels.PackedMatrix(dense[keep], kernels.pack(keep), 512)
    x, before, found = torch.randn(512), torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(packed.matvec(x))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_nothing_is_touched_past_the_end(backend):
    """Values and dense rows that end where their memory page does: one byte further is a crash."""
    size = mmap.PAGESIZE
    region = mmap.mmap(-1, 2 * size)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + size), ctypes.c_size_t(size), 0) == 0
    for columns in (64, 100):
        _, keep = _weight((7, columns), 0.5)
        num_values = int(keep.sum())
        offset = size // 4 - num_values
        values = torch.frombuffer(region, dtype=torch.float32, count=num_values, offset=4 * offset)
        values.copy_(torch.arange(num_values))
        dense = kernels.expand(values, kernels.pack(keep), columns)
        edge = torch.frombuffer(region, dtype=torch.float32, count=dense.numel(), offset=size - 4 * dense.numel())
        edge.copy_(dense.flatten())
        assert torch.equal(kernels.compact(edge.view(7, columns), kernels.pack(keep)), dense[keep])


@pytest.mark.parametrize(("change", "message"), [
    (lambda v, b: (v[:-1], b, 100), "positions, but there are"),
    (lambda v, b: (v, b[:, :-1], 100), "needs uint8"),
    (lambda v, b: (v, b.int(), 100), "needs uint8"),
    (lambda v, b: (v, b | 255, 100), "positions, but there are"),
])
def test_what_does_not_fit_is_refused(change, message):
    dense, keep = _weight((10, 100), 0.5)
    with pytest.raises(ValueError, match=message):
        kernels.expand(*change(dense[keep], kernels.pack(keep)))


def test_bits_past_the_last_column_are_refused():
    bits = kernels.pack(torch.ones(1, 100, dtype=torch.bool))
    bits[0, -1], bits[0, 0] = 128, 127
    with pytest.raises(ValueError, match="past column 100"):
        kernels.expand(torch.ones(100), bits, 100)


def test_matvec_refuses_what_it_cannot_multiply():
    packed = kernels.PackedMatrix(torch.ones(100), kernels.pack(torch.ones(1, 100, dtype=torch.bool)), 100)
    for x in (torch.ones(99), torch.ones(100, dtype=torch.float64)):
        with pytest.raises(ValueError, match="100 float32"):
            packed.matvec(x)


def test_an_unknown_backend_is_an_error():
    with pytest.raises(ValueError, match="no backend 'sse'"), kernels.use_backend("sse"):
        pass


def test_read_bandwidth_is_bytes_per_second():
    assert 1e8 < kernels.read_bandwidth(1 << 24, 1, 3) < 1e13
