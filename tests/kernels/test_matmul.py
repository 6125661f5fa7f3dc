"""Products with many rows, skipping zeros or by tiles, against float64, and the choice between products."""

import pytest
import torch
from torch.nn import functional

from sparse_train import kernels
from sparse_train.kernels import packed
from tests.kernels.test_kernels import page_before_a_crash

pytestmark = pytest.mark.sanitize

_EPS = torch.finfo(torch.float32).eps


def _matrix(shape, density, precision="fp32"):
    """(PackedMatrix, its values as dense float32, int4 with scales, scale per row)"""
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(shape, generator=generator) < density
    dense = torch.randn(shape, generator=generator) * keep
    if precision in ("fp32", "bf16"):
        values = dense[keep] if precision == "fp32" else dense[keep].bfloat16()
        dense[keep] = values.float()
        return kernels.PackedMatrix(values, kernels.pack(keep), shape[1]), dense, torch.ones(shape[0])
    if precision == "int4":
        codes = (dense * 3).round().clamp(-8, 7).to(torch.int8)
        scale = torch.randn(shape[0], -(-shape[1] // kernels.GROUP), generator=generator).bfloat16()
        return (kernels.PackedMatrix(codes[keep], kernels.pack(keep), shape[1], scale),
                codes * kernels.scale_of_columns(scale, shape[1]), torch.ones(shape[0]))
    codes, scale = (dense * 40).round().clamp(-128, 127).to(torch.int8), torch.rand(shape[0], generator=generator)
    return kernels.PackedMatrix(codes[keep], kernels.pack(keep), shape[1], scale), codes.float(), scale


def _rows(num_rows, num_columns):
    return torch.randn(num_rows, num_columns, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize(("shape", "num_rows"), [
    ((1, 1), 1), ((3, 63), 2), ((17, 64), 16), ((5, 65), 17), ((64, 127), 70), ((130, 200), 129), ((2, 1000), 300),
    ((600, 70), 40), ((3, 65_700), 9)])
def test_a_product_of_many_rows_is_exact_up_to_rounding(product, shape, num_rows, density):
    matrix, dense, scale = _matrix(shape, density, product)
    x = _rows(num_rows, shape[1])
    codes, step = (x, torch.ones(num_rows, 1)) if product in ("fp32", "bf16") else kernels.reference.quantise(x)
    factor = step.double() * scale
    exact = (codes.double() @ dense.double().T) * factor
    # n products err by at most n half rounding errors of the sum of their sizes; three for scales and their product.
    bound = ((dense != 0).sum(1) + 3) * _EPS / 2 * (codes.double().abs() @ dense.double().abs().T) * factor
    assert ((matrix.matmul(x) - exact).abs() <= bound).all()


@pytest.mark.usefixtures("skips")
def test_integer_sums_of_64_columns_are_exact(backend):
    codes = torch.full((2, 64), -128, dtype=torch.int8)
    matrix = kernels.PackedMatrix(codes.flatten(), kernels.pack(codes != 0), 64, torch.ones(2))
    x = torch.full((20, 64), 255.0)
    assert torch.equal(matrix.matmul(x), torch.full((20, 2), -128.0 * 255 * 64))


def test_a_row_has_the_same_bits_whatever_it_is_batched_with_on_any_number_of_threads(product):
    matrix, _, _ = _matrix((600, 300), 0.3, product)
    x, before = _rows(530, 300), torch.get_num_threads()
    whole = matrix.matmul(x)
    for first, last in ((0, 1), (3, 5), (100, 170), (255, 530)):
        assert torch.equal(matrix.matmul(x[first:last]), whole[first:last])
    assert torch.equal(matrix.matmul(x.view(2, 265, 300)), whole.view(2, 265, 600))
    assert torch.equal(matrix.matmul(x.T.contiguous().T), whole)
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(matrix.matmul(x), whole)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_is_as_in_a_dense_product_and_alone_in_that(product, odd):
    matrix, dense, _ = _matrix((70, 100), 0.5, product)
    x = _rows(40, 100)
    before = matrix.matmul(x)
    x[7, 3] = x[39, 99] = odd
    found, others = matrix.matmul(x), [i for i in range(40) if i not in (7, 39)]
    assert torch.equal(found[others], before[others])
    assert not found[[7, 39]].isfinite().any()
    if product in ("fp32", "bf16"):
        torch.testing.assert_close(found[[7, 39]], functional.linear(x[[7, 39]], dense), rtol=0, atol=0, equal_nan=True)


def test_no_activation_past_the_end_is_read(product):
    """x ends where its memory page does: one byte further is a crash."""
    region, size = page_before_a_crash()
    matrix, _, _ = _matrix((20, 100), 0.5, product)
    x = torch.frombuffer(region, dtype=torch.float32, count=700, offset=size - 2800).view(7, 100)
    x.copy_(_rows(7, 100))
    assert torch.equal(matrix.matmul(x), matrix.matmul(x.clone()))


def test_what_a_script_makes_torchs_default_is_not_what_native_code_writes_to(backend):
    matrix, dense, _ = _matrix((70, 100), 0.3)
    x = _rows(40, 100)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = matrix._skipping(x), matrix._expanding(x), matrix.to_dense()
            assert 0 <= packed._break_even.__wrapped__(8, "fp32", backend, 1) <= 1
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found[0], matrix._skipping(x))
    assert torch.equal(found[1], matrix._expanding(x))
    assert torch.equal(found[2], dense)


@pytest.mark.parametrize(("density", "skipped"), [(0.2, True), (0.4, False)])
def test_a_weight_denser_than_the_break_even_is_multiplied_dense(monkeypatch, density, skipped):
    monkeypatch.setattr(packed, "break_even", lambda *asked: {(12, "fp32"): 0.3}[asked])
    taken = []
    monkeypatch.setattr(kernels.PackedMatrix, "_skipping", lambda self, x: taken.append(x) or self._expanding(x))
    matrix, dense, _ = _matrix((70, 100), density)
    x = _rows(12, 100)
    assert torch.equal(matrix.matmul(x.view(3, 4, 100)), functional.linear(x, dense).view(3, 4, 70))
    assert bool(taken) == skipped
    assert matrix.matmul(x[:0]).shape == (0, 70)


@pytest.mark.parametrize("precision", ["bf16", "int4"])
def test_the_break_even_is_measured_once_for_a_power_of_two_of_rows(backend, precision, monkeypatch):
    packed._break_even.cache_clear()
    measured = []
    monkeypatch.setattr(packed, "_fastest", lambda product, x, fastest=packed._fastest:
                        measured.append(product.__self__.precision) or fastest(product, x))
    found = kernels.break_even(9, precision)
    assert 0 <= found <= 1 and found == kernels.break_even(15, precision)
    assert measured == [precision] * 4


def test_a_break_even_of_what_there_is_not():
    with pytest.raises(ValueError, match="num_rows is 0"):
        kernels.break_even(0, "fp32")
    with pytest.raises(ValueError, match="'fp16'; it must be one of fp32, bf16, int8, int4"):
        kernels.break_even(8, "fp16")


@pytest.mark.usefixtures("skips")
def test_bf16_values_give_the_bits_of_the_same_values_in_fp32(backend):
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(130, 200, generator=generator) < 0.4
    values = torch.randn(int(keep.sum()), generator=generator).bfloat16()
    bf16, fp32 = (kernels.PackedMatrix(v, kernels.pack(keep), 200) for v in (values, values.float()))
    assert torch.equal(bf16.matmul(_rows(20, 200)), fp32.matmul(_rows(20, 200)))
