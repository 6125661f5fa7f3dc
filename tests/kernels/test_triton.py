"""Triton's kernels against the reference: on a GPU compiled, without one interpreted, on tensors in CPU memory."""

import contextlib
import dataclasses
import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sparse_train import kernels
from sparse_train.kernels import devices, reference
from sparse_train.sparse import BitmaskTensor, SparseLinear
from tests.kernels.triton_cubins import PRODUCTS, TARGETS

triton = pytest.importorskip("triton")
moves = pytest.importorskip("sparse_train.kernels.triton_moves")
matrix = pytest.importorskip("sparse_train.kernels.triton_matrix")
tiles = pytest.importorskip("sparse_train.kernels.triton_tiles")
_HAS_GPU = torch.cuda.is_available()
_GPU = [pytest.mark.gpu, pytest.mark.skipif(not _HAS_GPU, reason="needs a CUDA device; torch sees none")]
_EACH_DEVICE = pytest.mark.parametrize("device", [
    pytest.param("cpu", marks=pytest.mark.skipif(_HAS_GPU, reason="Triton compiles its kernels for the GPU instead")),
    pytest.param("cuda", marks=_GPU)])
_DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.int8]
_MOST_INSTRUCTIONS = {"product-bf16-1": 15, "product-bf16-2": 17, "product-bf16-4": 27, "product-int8-1": 15,
                      "product-int4-1": 24, "product-2:4-1": 16, "product-bf16-16": 15, "product-bf16-64": 21,
                      "product-int8-16": 18, "product-int4-16": 21}
"""For a nonzero in runs, for a position in tiles. docs/benchmarks.md says what a GPU has time for."""
_AROUND = 8  # elements before and behind a target that must stay as they are


def _bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def _guarded(like):
    """(target like `like`, full of other bits, the memory that it is in)."""
    memory = torch.full((_AROUND + like.numel() + _AROUND,), 77, dtype=like.dtype, device=like.device)
    return memory[_AROUND:_AROUND + like.numel()].view(like.shape), memory


def _check(keep, dtype, shift=0):
    """Both moves of a weight of random bits, NaN and Inf among them. Values are `shift` elements, and the bits as many
    bytes, out of alignment."""
    generator = torch.Generator().manual_seed(0)
    num_values, num_columns = int(keep.sum()), keep.shape[1]
    raw = torch.randint(256, ((num_values + shift) * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    values = raw.to(keep.device).view(dtype)[shift:]
    mask = kernels.pack(keep)
    mask = torch.cat([mask.new_zeros(shift), mask.flatten()])[shift:].view(mask.shape)
    dense = torch.randint(256, (*keep.shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
    dense = dense.to(keep.device).view(dtype).squeeze(-1)
    for move, expected in ((lambda out: moves.expand(values, mask, num_columns, out),
                            reference.expand(values, mask, num_columns)),
                           (lambda out: moves.compact(dense, mask, num_values, out), reference.compact(dense, mask))):
        out, memory = _guarded(expected)
        assert move(out) is out
        assert torch.equal(_bits(out), _bits(expected))
        assert (memory[:_AROUND] == 77).all() and (memory[_AROUND + out.numel():] == 77).all()


def _random_keep(shape, density, device):
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < density
    if shape[0] > 2:
        keep[0], keep[-1] = False, True
    return keep.to(device)


@_EACH_DEVICE
@pytest.mark.parametrize(("shape", "density"), [
    ((1, 1), 1.0), ((1, 1), 0.0), ((1, 2048), 0.5), ((3, 63), 0.3), ((2, 64), 1.0), ((5, 65), 0.0), ((4, 200), 0.9),
    ((2, 2049), 0.5), ((3, 4200), 0.25), ((0, 64), 1.0), ((3, 0), 1.0)])
def test_every_bit_is_moved(shape, density, device):
    """Also where rows end within a byte or a tile, where a row is several tiles, and where rows keep all or nothing."""
    for shift, dtype in enumerate(_DTYPES):
        _check(_random_keep(shape, density, device), dtype, shift)


@_EACH_DEVICE
@pytest.mark.parametrize("num_parts", [1, 4, 15])
def test_a_part_is_several_tiles_of_several_rows(num_parts, device, monkeypatch):
    """As in large weights, of which a program reads the counts in several steps."""
    monkeypatch.setattr(moves, "_MOST_PARTS", num_parts)
    monkeypatch.setattr(moves, "_COUNTS", 4)
    monkeypatch.setattr(moves, "_MOST_BYTES", 16)
    _check(_random_keep((5, 300), 0.5, device), torch.bfloat16)


@_EACH_DEVICE
@pytest.mark.parametrize(("n", "m"), [(2, 4), (16, 32)])
def test_patterns(n, m, device):
    scores = torch.rand(6, 128 // m, m, generator=torch.Generator().manual_seed(0))
    keep = (scores.argsort(-1).argsort(-1) < n).flatten(1)
    assert keep.sum() == keep.numel() * n // m
    _check(keep.to(device), torch.float16)


@pytest.mark.parametrize("change", [-130, -1, 1, 40])
def test_bits_and_values_of_different_weights_stop_the_device(change, monkeypatch):
    """Interpreted, so that it is an exception. Until then nothing else is read or written."""
    if _HAS_GPU:
        pytest.skip("a GPU's assertion ends its process; see the test below")
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, debug=True, sanitize_overflow=False))
    keep = _random_keep((3, 200), 0.5, "cpu")
    mask, num_values = kernels.pack(keep), int(keep.sum()) + change
    values, memory = _guarded(torch.empty(num_values))
    values.fill_(1)
    dense = torch.zeros(3, 200)
    for move in (lambda: moves.expand(values, mask, 200, dense),
                 lambda: moves.compact(dense, mask, num_values, values)):
        with pytest.raises(Exception, match="another number of positions"):
            move()
        assert ((dense == 0) | (dense == 1)).all()
    assert (memory[:_AROUND] == 77).all() and (memory[_AROUND + num_values:] == 77).all()


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=_GPU)])
def test_an_assertion_of_the_device_ends_the_process(device):
    program = ("import torch\nfrom sparse_train import kernels\n"
               "bits = kernels.pack(torch.ones(3, 200, dtype=torch.bool, device='cuda'))\n"
               "kernels.expand(torch.ones(599, device='cuda'), bits, 200)\ntorch.cuda.synchronize()\n")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, encoding="utf-8")
    assert done.returncode != 0 and "another number of positions" in done.stdout + done.stderr


@_EACH_DEVICE
def test_a_checkpointed_layer_trains_to_the_bits_of_the_reference(device, monkeypatch):
    keep = _random_keep((5, 70), 0.3, device)
    dense = torch.randn(5, 70, generator=torch.Generator().manual_seed(0)).to(device)
    found = []
    for chosen in (moves.KERNELS, devices._REFERENCE):
        monkeypatch.setattr(devices, "_kernels_of", lambda device_type, chosen=chosen: dataclasses.replace(
            chosen, dtypes=moves.KERNELS.dtypes))
        layer = SparseLinear(BitmaskTensor.from_dense(dense, keep))
        x = torch.randn(3, 70, generator=torch.Generator().manual_seed(1)).to(device).requires_grad_()
        y = checkpoint(layer, x, use_reentrant=False)
        y.square().sum().backward()
        found.append((y.detach(), x.grad, layer.values.grad))
    for ours, plain in zip(*found, strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=_GPU)])
def test_no_move_waits_and_a_graph_repeats_them(device):
    """Warmed up, since a kernel is compiled when it is first used. The graph's second run has other values."""
    keep = _random_keep((300, 1000), 0.3, device)
    mask, num_values = kernels.pack(keep), int(keep.sum())
    values = torch.randn(num_values, device=device)
    compacted = kernels.compact(kernels.expand(values, mask, 1000), mask, num_values)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels.compact(kernels.expand(values, mask, 1000), mask, num_values)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dense = kernels.expand(values, mask, 1000)
        compacted = kernels.compact(dense, mask, num_values)
    for _ in range(2):
        values.normal_()
        dense.fill_(7), compacted.fill_(7)
        graph.replay()
        assert torch.equal(dense, reference.expand(values, mask, 1000)) and torch.equal(compacted, values)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=_GPU)])
def test_more_positions_than_an_int32_counts(device):
    num_rows, num_columns = 32_769, 65_536
    mask = torch.zeros(num_rows, num_columns // 8, dtype=torch.uint8, device=device)
    mask[0], mask[-1] = 255, 255
    values = torch.randint(1, 100, (2 * num_columns,), dtype=torch.int8, device=device)
    dense = kernels.expand(values, mask, num_columns)
    assert torch.equal(torch.cat([dense[0], dense[-1]]), values) and int(dense[1:-1].count_nonzero()) == 0
    assert torch.equal(kernels.compact(dense, mask, len(values)), values)


@pytest.fixture
def _interpreted_products(monkeypatch):
    """The interpreter would multiply the bits of BF16 numbers, as integers."""
    from triton.runtime import interpreter

    def as_floats(handle):
        data = interpreter._convert_float(handle.data, handle.dtype, triton.language.float32, None)
        return interpreter.TensorHandle(data.view("float32"), triton.language.float32)

    create_dot = interpreter.InterpreterBuilder.create_dot
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", lambda self, a, b, *others: create_dot(
        self, as_floats(a), as_floats(b), *others))


def _weight(keep, precision):
    """(values, scale, the weight in float64), random."""
    generator = torch.Generator().manual_seed(2)
    dense = torch.randn(keep.shape, generator=generator).bfloat16().to(keep.device)
    if precision == "bf16":
        return dense[keep], None, dense.double() * keep
    least, most = {"int8": (-128, 127), "int4": (-8, 7)}[precision]
    codes = (dense * (most / 2)).round().clamp(least, most).to(torch.int8)
    groups = -(-keep.shape[1] // kernels.GROUP)
    scale = torch.randn(len(keep), groups, generator=generator).bfloat16().to(keep.device)
    if precision == "int8":
        scale = scale[:, 0].float()
    of_columns = scale.double()[:, None] if precision == "int8" else kernels.scale_of_columns(scale, keep.shape[1])
    return codes[keep], scale, codes.double() * of_columns.double() * keep


def _new_nan(like, *shape, **options):
    new = like.new_zeros(*shape, **options)
    return new.fill_(math.nan) if new.is_floating_point() else new


def _check_product(keep, precision, num_rows, laid_out_for):
    values, scale, weight = _weight(keep, precision)
    packed = matrix.DeviceMatrix(values, kernels.pack(keep), keep.shape[1], scale, laid_out_for)
    assert (packed.shape, packed.precision, packed.device) == (keep.shape, precision, keep.device)
    x = torch.randn(num_rows, 1, keep.shape[1], generator=torch.Generator().manual_seed(3)).bfloat16().to(keep.device)
    with pytest.MonkeyPatch.context() as patch:  # what is not written is NaN
        patch.setattr(torch.Tensor, "new_empty", _new_nan)
        y, dense = packed.matvec(x), packed.to_dense()
    # A GPU rounds to the nearest BF16 number, the interpreter towards zero.
    rounding = torch.finfo(torch.bfloat16).eps / (2 if _HAS_GPU else 1)
    assert dense.dtype == torch.bfloat16 and ((dense - weight).abs() <= rounding * weight.abs()).all()
    # In whatever order they are added, n products err by at most n half rounding errors of the sum of their sizes.
    sizes = x.double().abs() @ weight.abs().T
    bound = (keep.sum(1) + 2) * torch.finfo(torch.float32).eps / 2 * sizes
    if num_rows > packed._most_rows and precision != "bf16":
        bound += rounding * sizes  # of the expanded weight
    expected = x.double() @ weight.T
    assert y.dtype == torch.bfloat16 and y.shape == expected.shape
    assert ((y - expected).abs() <= bound + rounding * (expected.abs() + bound)).all()
    return packed


@_EACH_DEVICE
@pytest.mark.parametrize(("precision", "shape", "density", "num_rows"), [
    ("bf16", (1, 1), 1.0, 1), ("bf16", (1, 1), 0.0, 1), ("bf16", (40, 300), 0.5, 1), ("bf16", (33, 1100), 0.004, 4),
    ("bf16", (3, 700), 0.9, 2), ("bf16", (0, 64), 1.0, 1), ("int8", (5, 70), 0.3, 7), ("int8", (33, 128), 0.02, 1),
    ("int4", (5, 70), 0.3, 17), ("int4", (33, 700), 0.1, 3), ("int4", (3, 4300), 0.2, 5), ("int4", (3, 256), 1.0, 1),
    *(pytest.param(precision, *weight, num_rows, marks=pytest.mark.slow) for precision, weight, num_rows
      in itertools.product(("bf16", "int8", "int4"), [((34, 1100), 0.02), ((70, 8200), 0.2), ((3, 16_500), 0.4)],
                           (1, 2, 3, 8, 17)))])
def test_runs_multiply_exactly_up_to_rounding(precision, shape, density, num_rows, device):
    """Also of rows that keep all or nothing, of the last rows of a block, and over distances that zeros must bridge."""
    keep = _random_keep(shape, density, device)
    keep[5:6] = torch.arange(shape[1], device=device) % 1020 == 0  # the greatest distance, several times
    _check_product(keep, precision, num_rows, laid_out_for=1)


@_EACH_DEVICE
@pytest.mark.parametrize(("precision", "shape", "density", "num_rows"), [
    ("bf16", (1, 1), 1.0, 1), ("bf16", (70, 128), 0.5, 16), ("bf16", (64, 64), 1.0, 65),
    ("int8", (3, 70), 0.2, 5), ("int4", (3, 200), 0.7, 20),
    *(pytest.param(precision, (70, 330), density, num_rows, marks=pytest.mark.slow) for precision, density, num_rows
      in itertools.product(("bf16", "int8", "int4"), (0.0, 0.02, 0.5, 1.0), (1, 8, 33, 64)))])
def test_tiles_multiply_exactly_up_to_rounding(precision, shape, density, num_rows, device, _interpreted_products,
                                               monkeypatch):
    """Also where each program multiplies several tiles."""
    monkeypatch.setattr(tiles, "_PROGRAMS", 3)
    packed = _check_product(_random_keep(shape, density, device), precision, num_rows, laid_out_for=1000)
    assert isinstance(packed._layout, tiles.Tiles)


@_EACH_DEVICE
@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (3, 8), (16, 32), pytest.param(8, 16, marks=pytest.mark.slow),
                                      pytest.param(16, 64, marks=pytest.mark.slow)])
def test_patterns_need_no_starts(n, m, precision, device):
    """Up to 16 columns. Rows of a larger pattern are as long as each other, but for zeros that bridge."""
    scores = torch.rand(33, 384 // m, m, generator=torch.Generator().manual_seed(0))
    keep = (scores.argsort(-1).argsort(-1) < n).flatten(1).to(device)
    packed = _check_product(keep, precision, 2, laid_out_for=1)
    assert packed._layout._pattern == ((n, m) if m <= 16 else None)


def test_the_width_of_distances_makes_the_fewest_bytes():
    """Four bits need zeros to bridge greater distances than 15, eight bits need more for each nonzero."""
    def bits(precision, density):
        keep = _random_keep((1, 4000), density, "cpu")
        values, scale, _ = _weight(keep, precision)
        return matrix.DeviceMatrix(values, kernels.pack(keep), 4000, scale)._layout._index_bits

    assert [bits("bf16", density) for density in (0.5, 0.2, 0.1, 0.02)] == [4, 4, 8, 8]
    assert [bits("int8", density) for density in (0.5, 0.2, 0.1, 0.02)] == [4, 4, 4, 8]
    assert bits("int4", 0.02) == 4  # so that a chunk lies in two groups at most


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=_GPU)])
@pytest.mark.parametrize(("laid_out_for", "num_rows"), [(1, 1), (1, 4), (1, 100), (16, 16), (16, 100)])
def test_no_product_waits_and_a_graph_repeats_it(laid_out_for, num_rows, device):
    keep = _random_keep((300, 1000), 0.3, device)
    values, _, _ = _weight(keep, "bf16")
    packed = matrix.DeviceMatrix(values, kernels.pack(keep), 1000, None, laid_out_for)
    x = torch.randn(num_rows, 1000, device=device, dtype=torch.bfloat16)
    packed.matmul(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        packed.matmul(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = packed.matmul(x)
    for _ in range(2):
        x.normal_()
        y.fill_(7)
        graph.replay()
        assert torch.equal(y, packed.matmul(x))


@pytest.mark.parametrize(("dtype", "num_columns", "scale", "told"), [
    (torch.float32, 64, None, "values is"), (torch.bfloat16, 128, None, "the bitmask is"),
    (torch.bfloat16, 0, None, "num_columns is 0"),
    (torch.int8, 64, None, "scale is missing"), (torch.bfloat16, 64, torch.ones(2), "scale is given"),
    (torch.int8, 64, torch.ones(3), "scale is"), (torch.int8, 64, torch.ones(2, 1), "scale is"),
    (torch.int8, 64, torch.ones(2, 1).bfloat16(), "values are 0 to 9"), (torch.bfloat16, 64, None, "the bits keep 3")])
def test_a_weight_that_no_product_takes_is_refused(dtype, num_columns, scale, told):
    mask = torch.zeros(2, 8 * -(-num_columns // 64) if num_columns != 128 else 8, dtype=torch.uint8)
    mask[:, :1] = 1
    values = torch.tensor([0, 9]).to(dtype)
    if "bits" in told:
        mask[0, 0] = 3
    with pytest.raises(ValueError, match=told):
        matrix.DeviceMatrix(values, mask, num_columns, scale)


@pytest.mark.parametrize("laid_out_for", [1, 1000])
@pytest.mark.parametrize("precision", ["bf16", "int4"])
def test_more_values_than_an_int32_counts_are_refused(precision, laid_out_for, monkeypatch):
    keep = torch.ones(64, 128, dtype=torch.bool)
    values, scale, _ = _weight(keep, precision)
    for most in (keep.numel(), keep.numel() - 1):
        monkeypatch.setattr(matrix, "_MOST_PLACES", most)
        with pytest.raises(ValueError, match="takes 8192 values") if most < 8192 else contextlib.nullcontext():
            matrix.DeviceMatrix(values, kernels.pack(keep), 128, scale, laid_out_for)


@pytest.mark.slow
def test_they_compile_for_each_generation_without_spills(tmp_path):
    """With Triton's own assembler, so no GPU is needed: as a call launches them, with the types and alignments that it
    finds in its arguments. In a process of its own, in which nothing is interpreted."""
    done = subprocess.run([sys.executable, "-m", "tests.kernels.triton_cubins"], capture_output=True, text=True,
                          encoding="utf-8",
                          env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    found = [dict(word.split("=") for word in line.split()) for line in done.stdout.splitlines()]
    moved = {(f"{move}-{size}", kernel) for move in ("expand", "compact") for size in (2, 4)
             for kernel in ("_count_parts", "_move_parts")}
    products = {(f"product-{name}-{num_rows}", kernel) for name, counts in PRODUCTS.items() for num_rows in counts
                for kernel in (["_multiply"] if num_rows <= 4 and name != "wide" else ["_multiply", "_add"])}
    steps = {(f"steps-{name}", kernel) for name in ("llama-8b", "mpt-7b")
             for kernel in ("_normalise", "_attend", "_add_parts", "_activate")}
    assert {(row["target"], row["call"], row["kernel"]) for row in found} == {
        (str(target), *call) for target, call in itertools.product(TARGETS, moved | products | steps)}
    for row in found:
        assert row["LOCAL"] == row["STACK"] == "0", row  # nothing is spilled
        if row["call"].startswith("steps"):  # of which each multiprocessor has one program or two
            continue
        # A multiprocessor holds five programs of moves at a time, and four of tiles.
        assert int(row["REG"]) <= (128 if row["call"].startswith("product") else 96), row
        assert int(row["shared"]) <= 99 * 1024, row  # what 8.6 and 8.9 have
        most = _MOST_INSTRUCTIONS.get(row["call"], 22)
        assert float(row["instructions"]) <= most, row
