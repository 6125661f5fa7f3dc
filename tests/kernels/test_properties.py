"""What holds for every weight, on random ones: any shape, density, place in memory, batch and number of threads.

`make test-sanitize` runs them where a sanitizer watches each access. A tensor ends where its memory does, so that what
is read or written past it is found.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from sparse_train import kernels
from sparse_train.kernels import reference

pytestmark = pytest.mark.sanitize

_EPS = torch.finfo(torch.float32).eps
_MOVED = [torch.float32, torch.bfloat16, torch.float16, torch.int8]
_ROWS = [0, 1, 2, 3, 4, 5, 9, 66, 261]
_COLUMNS = [0, 1, 8, 63, 64, 65, 128, 200, 1000]
_DENSITIES = [0.0, 0.02, 0.3, 0.5, 0.9, 1.0]
_SEEDS = [*range(8), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(8, 60))]


def _floats(dtype):
    def make(keep, chance):
        values = _placed(torch.randn(int(keep.sum()), generator=chance.generator).to(dtype), chance)
        return {"values": values}, torch.ones(1, 1)
    return make


def _int8(keep, chance):
    codes = torch.randint(-128, 128, (int(keep.sum()),), generator=chance.generator, dtype=torch.int8)
    codes[torch.rand(codes.shape, generator=chance.generator) < 0.2] = -128
    scale = torch.rand(len(keep), generator=chance.generator) + 0.1
    return {"values": _placed(codes, chance), "scale": _placed(scale, chance)}, scale[:, None]


def _int4(keep, chance):
    codes = torch.randint(-8, 8, (int(keep.sum()),), generator=chance.generator, dtype=torch.int8)
    num_groups = -(-keep.shape[1] // kernels.GROUP)
    size = chance.choice([1.0, 1e-38, 3e33 * max(1, num_groups) ** -0.5])  # sums of the last nearly overflow
    scale = (torch.randn(len(keep), num_groups, generator=chance.generator) * size).bfloat16()
    given = {"values": _placed(codes, chance), "scale": _placed(scale, chance)}
    return given, kernels.scale_of_columns(scale, keep.shape[1])


@dataclass(frozen=True)
class _Precision:
    name: str
    make: Callable[..., tuple[dict, torch.Tensor]]
    """keep (R, C) -> the arguments of PackedMatrix besides bits and columns, and what multiplies the values, by row and
    column"""
    rounds_x: bool = False
    """Whether activations become codes of 8 bits."""

    def __str__(self):
        return self.name


PRECISIONS = [_Precision("fp32", _floats(torch.float32)), _Precision("bf16", _floats(torch.bfloat16)),
               _Precision("int8", _int8, rounds_x=True), _Precision("int4", _int4, rounds_x=True)]


class Chance(random.Random):
    def __init__(self, seed):
        super().__init__(seed)
        self.generator = torch.Generator().manual_seed(seed)


def _placed(tensor, chance):
    """The same numbers at another alignment, at the end of their memory."""
    before = chance.randrange(8)
    return torch.cat([tensor.new_zeros(before), tensor.flatten()])[before:].view(tensor.shape)


def random_keep(chance, num_columns=None):
    """(R, C), with a row and a column of which everything or nothing is kept, now and then."""
    num_rows = chance.choice(_ROWS if num_columns is None else _ROWS[:6])
    num_columns = chance.choice(_COLUMNS) if num_columns is None else num_columns
    keep = torch.rand(num_rows, num_columns, generator=chance.generator) < chance.choice(_DENSITIES)
    if keep.numel():
        keep[chance.randrange(num_rows)] = chance.random() < 0.5
        keep[:, chance.randrange(num_columns)] = chance.random() < 0.5
    return keep


@pytest.fixture
def threads():
    """Call it with a number for the rest of the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _use_threads(threads, chance, num_rows):
    threads(chance.choice([1, 2, min(num_rows, 10) + 2]))


@pytest.mark.parametrize("dtype", _MOVED)
@pytest.mark.parametrize("seed", _SEEDS)
def test_what_is_moved_keeps_its_bits(backend, threads, dtype, seed):
    chance = Chance(seed)
    keep = random_keep(chance)
    _use_threads(threads, chance, len(keep))
    num_columns, num_bytes = keep.shape[1], int(keep.sum()) * dtype.itemsize
    raw = torch.randint(256, (num_bytes,), generator=chance.generator, dtype=torch.uint8).view(dtype)
    values, bits = _placed(raw, chance), _placed(kernels.pack(keep), chance)
    expected = reference.expand(values, bits, num_columns)
    out = _placed(torch.ones_like(expected), chance)
    _same_bits(kernels.expand(values, bits, num_columns, out=out), expected)
    _same_bits(kernels.compact(_placed(expected, chance), bits, out=_placed(torch.ones_like(values), chance)), values)
    assert torch.equal(kernels.unpack(bits, num_columns), keep)


def _same_bits(found, expected):
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32}[expected.itemsize]
    assert torch.equal(found.view(whole), expected.view(whole))


@pytest.mark.usefixtures("skips")
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("seed", _SEEDS)
def test_products_are_exact_up_to_rounding(backend, threads, precision, seed):
    chance = Chance(seed)
    _check_products(random_keep(chance), precision, chance, threads)


@pytest.mark.usefixtures("skips")
@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("num_columns", [65_535, 65_600])
def test_products_of_long_rows(backend, threads, precision, num_columns):
    chance = Chance(num_columns)
    _check_products(random_keep(chance, num_columns), precision, chance, threads)


def _check_products(keep, precision, chance, threads):
    num_rows, num_columns = keep.shape
    bits = _placed(kernels.pack(keep), chance)
    given, factor = precision.make(keep, chance)
    _use_threads(threads, chance, num_rows)
    matrix = kernels.PackedMatrix(bitmask=bits, num_columns=num_columns, **given)
    dense = reference.expand(given["values"].double(), bits, num_columns) * factor.double()
    rounding = _EPS / 2 * dense.abs()  # of a value times its scale
    assert ((matrix.to_dense() - dense).abs() <= rounding).all()
    for count in range(10):
        x = _placed(torch.randn(count, num_columns, generator=chance.generator), chance)
        exact, bound = product(x, dense, keep, precision.rounds_x)
        out = _placed(torch.ones(count, num_rows), chance)
        matrix.product(x, out)()
        ways = [matrix.matvec, matrix.matmul, *([matrix._expanding] if x.numel() else [])]
        products = [*(way(x) for way in ways), out]
        for found in products:
            assert ((found - exact).abs() <= bound).all()
        if x.numel():  # a row that is not finite, among others that are
            odd = chance.randrange(count)
            others = [row for row in range(count) if row != odd]
            x[odd, chance.randrange(num_columns)] = chance.choice([torch.nan, torch.inf, -torch.inf])
            matrix.product(x, out)()
            for found, before in zip([*(way(x) for way in ways), out], products, strict=True):
                assert torch.equal(found[others], before[others])
                assert not found[odd].isfinite().any()


def product(x, dense, keep, rounds_x):
    """(exact product, how far a result may be from it): in whatever order they are added, n products err by at most n
    half rounding errors of the sum of their sizes; two more for scales, one for their product. Below the normal numbers
    errors do not shrink."""
    if not x.numel():
        return torch.zeros(len(x), len(keep)), torch.zeros(len(x), len(keep))
    codes, step = reference.quantise(x) if rounds_x else (x, torch.ones(1))
    codes, step = codes.double(), step.double()
    sizes = codes.abs()
    if rounds_x:  # products may be of codes from 0 to 255, from whose sum the zero point's share is taken
        sizes = sizes.maximum(codes - codes.amin(1, keepdim=True).clamp(max=0))
    bound = (keep.sum(1) + 3) * _EPS / 2 * (sizes @ dense.abs().T) * step + torch.finfo(torch.float32).tiny * _EPS
    return codes @ dense.T * step, bound
