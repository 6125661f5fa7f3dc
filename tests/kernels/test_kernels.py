"""Native kernels against float64 and against the torch reference, at shapes that end in the middle of everything."""

import ctypes
import mmap
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional

from sparse_train import kernels
from sparse_train.kernels import reference

pytestmark = pytest.mark.sanitize

_SHAPES = [(1, 1), (3, 63), (17, 64), (5, 65), (64, 127), (130, 200), (2, 1000), (257, 512)]
_EPS = torch.finfo(torch.float32).eps
_DENSITIES = [0.0, 0.1, 0.5, 1.0]


def _weight(shape, density, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(shape, generator=generator) < density
    dense = torch.randn(shape, generator=generator)
    is_integer = dtype in (torch.int8, "int4")
    dtype = torch.int8 if is_integer else dtype
    dense = (dense * 40).round().clamp(-127, 127).to(dtype) if is_integer else dense.to(dtype)
    return torch.where(keep, dense, torch.zeros((), dtype=dtype)), keep


def _packed(dense, keep, dtype):
    """(PackedMatrix, the weight that it multiplies with, float64), of `dense` as a weight of _weight has it; "int4"
    cuts int8 codes to four bits."""
    generator, bits, (num_rows, num_columns) = torch.Generator().manual_seed(2), kernels.pack(keep), dense.shape
    if dtype == "int4":
        codes = (dense // 16).to(torch.int8)
        scale = torch.randn(num_rows, -(-num_columns // kernels.GROUP), generator=generator).bfloat16()
        weight = codes.double() * kernels.scale_of_columns(scale, num_columns)
        return kernels.PackedMatrix(codes[keep], bits, num_columns, scale), weight
    if dtype == torch.int8:
        scale = torch.rand(num_rows, generator=generator) + 0.1
        return kernels.PackedMatrix(dense[keep], bits, num_columns, scale), dense.double() * scale[:, None].double()
    return kernels.PackedMatrix(dense[keep], bits, num_columns), dense.double()


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


@pytest.mark.parametrize(("dtype", "threads"), [(torch.float32, 1), (torch.float32, 2), (torch.bfloat16, 1)])
@pytest.mark.parametrize("density", _DENSITIES)
@pytest.mark.parametrize("shape", [*_SHAPES, (1024, 384)])
def test_float_matvec_is_exact_up_to_rounding(backend, shape, density, dtype, threads):
    dense, keep = _weight(shape, density, dtype)
    x = torch.randn(shape[1], generator=torch.Generator().manual_seed(1))
    exact = dense.double() @ x.double()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = kernels.PackedMatrix(dense[keep], kernels.pack(keep), shape[1]).matvec(x)
    finally:
        torch.set_num_threads(before)
    # In whatever order they are added, n products err by at most n half rounding errors of the sum of their sizes.
    bound = keep.sum(1).clamp(min=1) * _EPS / 2 * (dense.double().abs() @ x.double().abs())
    assert ((y - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, "int4"])
@pytest.mark.parametrize("shape", [(1, 1), (7, 100), (130, 200)])
def test_vectors_give_the_same_bits_together_and_alone(backend, shape, dtype):
    packed, _ = _packed(*_weight(shape, 0.4, dtype), dtype)
    x = torch.randn(19, shape[1], generator=torch.Generator().manual_seed(1))
    alone = torch.stack([packed.matvec(vector) for vector in x])
    for count in (*range(1, 10), 19):
        assert torch.equal(packed.matvec(x[:count]), alone[:count]), count
    assert torch.equal(packed.matvec(x[:6].view(2, 3, -1)), alone[:6].view(2, 3, -1))
    assert packed.matvec(x[:0]).shape == (0, shape[0])
    x[3, 0] = float("inf")
    together = packed.matvec(x)
    assert torch.equal(together.isfinite(), torch.arange(19).ne(3)[:, None].expand_as(together))
    assert torch.equal(together[4:], alone[4:])
    if dtype == torch.int8:
        with kernels.use_backend("portable"):
            assert torch.equal(packed.matvec(x[4:]), alone[4:])


@pytest.mark.parametrize("density", _DENSITIES)
@pytest.mark.parametrize("shape", [*_SHAPES, (1024, 384)])
def test_int8_matvec_is_the_integer_product(backend, shape, density):
    codes, keep = _weight(shape, density, torch.int8)
    x = torch.randn(shape[1], generator=torch.Generator().manual_seed(1))
    packed, weight = _packed(codes, keep, torch.int8)
    exact = _product_of_codes(weight, x)
    torch.testing.assert_close(packed.matvec(x).double(), exact, rtol=_EPS, atol=0)  # rounded once


def _codes_of(x):
    """(8-bit codes, zero point, step) of x in float64."""
    x = x.double()
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    inverse = 1 / ((high - low) / 255)
    zero = (-low * inverse).round()
    return ((x * inverse).round() + zero).clamp(0, 255), zero, (high - low) / 255


def _product_of_codes(weight, x):
    """(R,) float64: the weight times x as 8-bit codes."""
    codes, zero, step = _codes_of(x)
    return step * (weight.double() @ (codes - zero))


@pytest.mark.parametrize("density", _DENSITIES)
@pytest.mark.parametrize("shape", [*_SHAPES, (6, 129), (1024, 384), (9, 2100)])
def test_int4_matvec_is_exact_in_each_group_and_sums_groups_as_floats(backend, shape, density):
    packed, weight = _packed(*_weight(shape, density, "int4"), "int4")
    x = torch.randn(8, shape[1], generator=torch.Generator().manual_seed(1))
    for vector, found in zip(x, packed.matvec(x), strict=True):
        codes, _, step = _codes_of(vector)
        # Each group rounds at most twice on its way into a sum, the lanes of sums and the result a few times more.
        groups = functional.pad(weight.abs() * codes, (0, -shape[1] % kernels.GROUP)).unflatten(1, (-1, kernels.GROUP))
        bound = (2 * groups.shape[1] + 6) * _EPS / 2 * step * groups.sum((1, 2))
        exact = _product_of_codes(weight, vector)
        assert ((found - exact).abs() <= bound + _EPS / 2 * exact.abs()).all()


@pytest.mark.parametrize("factor", [1e-44, 1e-38, 1e-37, 1e-30, 1e30, 1e38])
def test_int8_matvec_scales_with_x_to_the_ends_of_float32(backend, factor):
    codes, keep = _weight((70, 100), 0.5, torch.int8)
    scale = torch.full((70,), 1e-3 if factor > 1 else 1e3)
    x = torch.linspace(-3, 3, 100).mul(factor)
    found = kernels.PackedMatrix(codes[keep], kernels.pack(keep), 100, scale).matvec(x)
    denormal = torch.finfo(torch.float32).smallest_normal * _EPS
    exact = _product_of_codes(codes.double() * scale[:, None].double(), x)
    torch.testing.assert_close(found.double(), exact, rtol=_EPS, atol=denormal)


@pytest.mark.parametrize("num_columns", [65_794, 530_000, 1_100_000])
def test_int8_sums_do_not_wrap(backend, num_columns):
    """65,794 products of 255 and -128 pass what an int32 holds; the others are more than a register of them holds."""
    codes = torch.stack([torch.full((num_columns,), code, dtype=torch.int8) for code in (-128, 127)])
    packed = kernels.PackedMatrix(codes.flatten(), kernels.pack(torch.ones(codes.shape, dtype=torch.bool)), num_columns,
                                  torch.ones(2))
    for x, code in ((255.0, 255), (-255.0, -255)):
        exact = code * num_columns * torch.tensor([-128.0, 127.0], dtype=torch.float64)
        assert torch.equal(packed.matvec(torch.full((num_columns,), x)), exact.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8, "int4"])
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("places", [[7], [99], range(100)])
def test_what_is_not_finite_stays_so(backend, dtype, odd, places):
    """As in a dense product: Inf where the weight at an infinite x is kept, NaN where it is pruned."""
    packed, weight = _packed(*_weight((70, 100), 0.5, dtype), dtype)
    x = torch.linspace(-1, 1, 100)
    x[list(places)] = odd
    found = packed.matvec(x)
    assert not found.isfinite().any()
    torch.testing.assert_close(found, weight.float() @ x, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("shape", [(40, 100), (150, 257)])
@pytest.mark.parametrize("dtype", [torch.int8, "int4"])
def test_to_dense_is_what_matvec_multiplies_with(backend, dtype, shape):
    packed, weight = _packed(*_weight(shape, 0.3, dtype), dtype)
    assert torch.equal(packed.to_dense(), weight.float())


@pytest.mark.parametrize("shape", [(1, 1), (63, 200), (130, 257)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, "int4"])
def test_a_copy_of_the_block_is_the_matrix(backend, dtype, shape):
    packed, weight = _packed(*_weight(shape, 0.4, dtype), dtype)
    block, other = bytearray(packed.block), _packed(*_weight(shape, 0.4, dtype), dtype)[0]
    assert block == other.block  # no byte is left to chance
    again = kernels.PackedMatrix.from_block(memoryview(block))
    for key in ("shape", "density", "precision", "num_bytes"):
        assert getattr(again, key) == getattr(packed, key)
    assert torch.equal(again.to_dense(), packed.to_dense()) and torch.equal(again.to_dense(), weight.float())
    x = torch.randn(20, shape[1], generator=torch.Generator().manual_seed(3))
    assert torch.equal(again.matvec(x[:3]), packed.matvec(x[:3])) and torch.equal(again.matmul(x), packed.matmul(x))
    with pytest.raises(ValueError, match=f"of {len(block)} bytes has {len(block) - 64}"):
        kernels.PackedMatrix.from_block(memoryview(block)[:-64])


@pytest.mark.parametrize("shape", [(1, 1), (63, 200), (130, 257)])
@pytest.mark.parametrize("density", [0.4, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_those_of_an_embedding(backend, dtype, density, shape):
    packed, weight = _packed(*_weight(shape, density, dtype), dtype)
    indices = torch.randint(shape[0], (2, 40), generator=torch.Generator().manual_seed(4))
    assert torch.equal(packed.rows(indices), functional.embedding(indices, weight.float()))
    assert packed.rows(indices[:, :0]).shape == (2, 0, shape[1])
    for row in (-1, shape[0]):
        with pytest.raises(IndexError, match=f"row {row} of a weight with {shape[0]}"):
            packed.rows(torch.tensor([0, row]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_values_and_bits(dtype):
    dense, keep = _weight((63, 256), 0.25, dtype)
    packed = kernels.PackedMatrix(dense[keep], kernels.pack(keep), 256)
    assert packed.num_bytes == dense.itemsize * int(keep.sum()) + 63 * 256 // 8
    assert torch.equal(packed.to_dense(), dense.float())


def test_int4_takes_half_a_byte_a_bit_and_scales_of_two_bytes():
    packed, _ = _packed(*_weight((63, 200), 0.25, "int4"), "int4")
    num_values = round(packed.density * 63 * 200)
    assert packed.num_bytes == -(-num_values // 2) + 63 * (256 // 8 + 2 * 2 + 8)  # 8: the row's sum
    assert packed.precision == "int4"


@pytest.mark.parametrize("only", [0, 1])
def test_int4_codes_that_all_lie_in_words_of_one_kind(backend, only):
    keep = (torch.arange(600) // 64 % 2 == only).repeat(9, 1)
    packed, weight = _packed(torch.full((9, 600), -77, dtype=torch.int8) * keep, keep, "int4")
    assert torch.equal(packed.to_dense(), weight.float())
    x = torch.arange(600.0) % 256  # codes of themselves
    torch.testing.assert_close(packed.matvec(x).double(), weight @ x.double(), rtol=20 * _EPS, atol=0)


def test_threads_agree_to_the_bit(backend):
    dense, keep = _weight((2048, 512), 0.3)
    packed = kernels.PackedMatrix(dense[keep], kernels.pack(keep), 512)
    x, before, found = torch.randn(512), torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(packed.matvec(x))
    torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


_CHILD = """
import ctypes, torch
from sparse_train import kernels

def check():
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(4096, 512, generator=generator) < 0.5
    codes = torch.randint(-127, 128, keep.shape, generator=generator).mul(keep)
    x = torch.randint(-127, 128, (512,), generator=generator).float()
    x[:2] = torch.tensor([-127.0, 128.0])  # the step is 1, so both products are exact
    bits, poison = kernels.pack(keep), float("nan")
    for name in kernels.backends():
        with kernels.use_backend(name):
            for dtype in (torch.float32, torch.bfloat16, torch.int8):
                dense = codes.to(dtype)
                out = torch.full_like(dense, 99)
                assert torch.equal(kernels.expand(dense[keep], bits, 512, out=out), dense), (name, dtype, "expand")
                out = torch.full_like(dense[keep], 99)
                assert torch.equal(kernels.compact(dense, bits, out=out), dense[keep]), (name, dtype, "compact")
            for kind, scale in (("fp32", None), ("int8", torch.ones(4096)), ("int4", torch.ones(4096, 4).bfloat16())):
                dense = codes // 16 if kind == "int4" else codes
                values = dense[keep].to(torch.float32 if scale is None else torch.int8)
                exact = (dense @ x.long()).float()
                packed = kernels.PackedMatrix(values, bits, 512, scale)
                del values
                torch.full((4096,), poison)  # what matvec's y and to_dense's weight are made from, freed again
                assert torch.equal(packed.matvec(x), exact), (name, kind, "matvec")
                assert torch.equal(packed.to_dense(), dense.float()), (name, kind, "to_dense")
                for multiply in (packed._skipping, packed._expanding):
                    torch.full((40, 4096), poison)
                    assert torch.equal(multiply(x.expand(40, -1)), exact.expand(40, -1)), (name, kind, multiply)

torch.set_num_threads(4)
check()
library = ctypes.CDLL("libgomp.so.1")
failed = []  # another thread may choose another backend at any time, and a product is right with any

def in_a_region(_):
    try:
        check()
    except BaseException as error:
        failed.append(error)

region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(in_a_region)
library.GOMP_parallel(region, None, 2, 0)
assert not failed, failed
print("complete")
"""


@pytest.mark.parametrize("limit", ["OMP_THREAD_LIMIT=1", *(pytest.param(limit, marks=pytest.mark.slow) for limit in (
    "OMP_MAX_ACTIVE_LEVELS=0", "OMP_DYNAMIC=true", "OMP_NUM_THREADS=3"))])
def test_all_rows_are_done_on_whatever_threads_openmp_gives(limit):
    name, _, value = limit.partition("=")
    child = subprocess.run([sys.executable, "-c", _CHILD], env=os.environ | {name: value}, text=True,
                           capture_output=True, timeout=120)
    assert child.stdout == "complete\n", child.stderr[-500:]


def page_before_a_crash():
    """(memory, its readable bytes): one byte further is a crash."""
    size = mmap.PAGESIZE
    region = mmap.mmap(-1, 2 * size)
    address = ctypes.addressof(ctypes.c_char.from_buffer(region))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + size), ctypes.c_size_t(size), 0) == 0
    return region, size


def test_nothing_is_touched_past_the_end(backend):
    """Values and dense rows that end where their memory page does: one byte further is a crash."""
    region, size = page_before_a_crash()
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
    (lambda v, b: (v, b[:, :-1], 100), "it must be a tensor of shape"),
    (lambda v, b: (v, b.int(), 100), "it must be a tensor of shape"),
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


def _good():
    """(function, its arguments by name) of every public function that takes tensors or counts."""
    codes, keep = _weight((10, 100), 0.5, torch.int8)
    bits, dense = kernels.pack(keep), codes.float()
    weight = {"values": dense[keep], "bitmask": bits, "num_columns": 100}
    int8 = {**weight, "values": codes[keep], "scale": torch.ones(10)}
    int4 = {**weight, "values": codes[keep] // 16, "scale": torch.ones(10, 1).bfloat16()}
    return {
        "pack": (kernels.pack, {"keep": keep}),
        "unpack": (kernels.unpack, {"bitmask": bits, "num_columns": 100}),
        "expand": (kernels.expand, {**weight, "out": torch.empty(10, 100)}),
        "compact": (kernels.compact, {"dense": dense, "bitmask": bits, "num_values": int(keep.sum()),
                                      "out": torch.empty(int(keep.sum()))}),
        "PackedMatrix": (kernels.PackedMatrix, weight),
        "PackedMatrix int8": (kernels.PackedMatrix, int8),
        "PackedMatrix int4": (kernels.PackedMatrix, int4),
        "matvec": (kernels.PackedMatrix(**weight).matvec, {"x": torch.ones(100)}),
        "matmul": (kernels.PackedMatrix(**weight).matmul, {"x": torch.ones(20, 100)}),
        "matvec int4": (kernels.PackedMatrix(**int4).matvec, {"x": torch.ones(100)}),
        "matvec int8": (kernels.PackedMatrix(**int8).matvec, {"x": torch.ones(100)}),
        "read_bandwidth": (kernels.read_bandwidth, {"num_bytes": 1 << 16, "num_threads": 1, "repeats": 1}),
    }


def _bad(value):
    if isinstance(value, int):
        return [-1, -2**63, 2**62, 2**70, value + 0.5, str(value), torch.tensor(value)]
    return [
        value.to("meta"), value[:-1], torch.cat([value, value]), value.sum(), value.to_sparse(),
        value.to(torch.complex64), value.float().numpy(), value.tolist(), "values",
    ] + ([value.cuda()] if torch.cuda.is_available() else [])


# Of these the first bad values are good ones.
_ANY_ROWS = {("pack", "keep"): 3, ("unpack", "bitmask"): 3, ("matmul", "x"): 3}


@pytest.mark.parametrize("name", sorted(_good()))
def test_bad_arguments_are_refused_before_native_code_sees_them(name):
    function, given = _good()[name]
    function(**given)
    for key, value in given.items():
        for bad in _bad(value)[_ANY_ROWS.get((name, key), 0):]:
            try:
                function(**{**given, key: bad})
            except (ValueError, MemoryError):
                continue
            pytest.fail(f"{key}={bad!r} was taken")


def test_a_tensor_that_only_claims_its_sign_is_read_with_it():
    negative = torch.complex(torch.zeros(100), torch.ones(100)).conj().imag
    assert negative.is_neg()
    keep = torch.ones(1, 100, dtype=torch.bool)
    assert torch.equal(kernels.expand(negative, kernels.pack(keep), 100), -torch.ones(1, 100))
    assert kernels.PackedMatrix(torch.ones(100), kernels.pack(keep), 100).matvec(negative).item() == -100


def test_the_fastest_backend_comes_first_and_portable_last_and_an_unknown_one_is_an_error():
    for name in kernels.backends():
        with kernels.use_backend(name):
            assert kernels.backend() == name
    assert kernels.backends()[-1] == "portable"
    with pytest.raises(ValueError, match="no backend 'sse'"), kernels.use_backend("sse"):
        pass


def test_read_bandwidth_is_bytes_per_second():
    assert 1e8 < kernels.read_bandwidth(1 << 24, 1, 3) < 1e13


def test_codes_of_more_than_four_bits_and_scales_of_another_dtype_are_refused():
    keep = torch.ones(3, 200, dtype=torch.bool)
    codes, bits = torch.full((600,), 7, dtype=torch.int8), kernels.pack(keep)
    codes[5] = 8
    with pytest.raises(ValueError, match="values are 7 to 8; with a scale per group"):
        kernels.PackedMatrix(codes, bits, 200, torch.ones(3, 2).bfloat16())
    with pytest.raises(ValueError, match="one of: bfloat16"):
        kernels.PackedMatrix(codes, bits, 200, torch.ones(3, 2))
