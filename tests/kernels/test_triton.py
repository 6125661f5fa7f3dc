"""Triton's kernels against the reference: on a GPU compiled, without one interpreted, on tensors in CPU memory."""

import dataclasses
import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sparse_train import kernels
from sparse_train.kernels import devices, reference
from sparse_train.sparse import BitmaskTensor, SparseLinear
from tests.kernels.triton_cubins import TARGETS

triton = pytest.importorskip("triton")
moves = pytest.importorskip("sparse_train.kernels.triton_moves")
matrix = pytest.importorskip("sparse_train.kernels.triton_matrix")
_HAS_GPU = torch.cuda.is_available()
_GPU = [pytest.mark.gpu, pytest.mark.skipif(not _HAS_GPU, reason="needs a CUDA device; torch sees none")]
_EACH_DEVICE = pytest.mark.parametrize("device", [
    pytest.param("cpu", marks=pytest.mark.skipif(_HAS_GPU, reason="Triton compiles its kernels for the GPU instead")),
    pytest.param("cuda", marks=_GPU)])
_DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.int8]
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


@_EACH_DEVICE
@pytest.mark.parametrize(("shape", "density"), [
    ((1, 1), 1.0), ((1, 1), 0.0), ((5, 70), 0.3), ((40, 300), 0.5), ((33, 1500), 0.004), ((70, 128), 0.1),
    ((2, 4097), 0.2), ((3, 2100), 0.9), ((0, 64), 1.0)])
def test_a_product_is_exact_up_to_rounding(shape, density, device):
    """Also of rows that keep all or nothing, of the last rows of a block, and over distances that zeros must bridge."""
    generator = torch.Generator().manual_seed(2)
    keep = _random_keep(shape, density, device)
    keep[5:6] = torch.arange(shape[1], device=device) % 1020 == 0  # the greatest distance, several times
    dense = torch.randn(shape, generator=generator).bfloat16().to(device) * keep
    x = torch.randn(2, 1, shape[1], generator=generator).bfloat16().to(device)
    y = matrix.DeviceMatrix(dense[keep], kernels.pack(keep), shape[1]).matvec(x)
    # In whatever order they are added, n products err by at most n half rounding errors of the sum of their sizes.
    expected = x.double() @ dense.double().T
    bound = keep.sum(1) * torch.finfo(torch.float32).eps / 2 * (x.double().abs() @ dense.double().abs().T)
    # A GPU rounds the sum to the nearest BF16 number, the interpreter towards zero.
    bound += torch.finfo(torch.bfloat16).eps / (2 if _HAS_GPU else 1) * (expected.abs() + bound)
    assert y.dtype == torch.bfloat16 and ((y - expected).abs() <= bound).all()


@pytest.mark.parametrize(("dtype", "num_columns", "told"), [
    (torch.float32, 64, "values is"), (torch.bfloat16, 128, "the bitmask is"), (torch.bfloat16, 0, "num_columns is 0"),
    (torch.bfloat16, 40_000, "num_columns is 40000")])
def test_a_weight_that_no_product_takes_is_refused(dtype, num_columns, told):
    mask = torch.zeros(2, 8 * -(-num_columns // 64) if num_columns != 128 else 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=told):
        matrix.DeviceMatrix(torch.zeros(0, dtype=dtype), mask, num_columns)


@pytest.mark.slow
def test_they_compile_for_each_generation_without_spills(tmp_path):
    """With Triton's own assembler, so no GPU is needed: as a call launches them, with the types and alignments that it
    finds in its arguments. In a process of its own, in which nothing is interpreted."""
    done = subprocess.run([sys.executable, "-m", "tests.kernels.triton_cubins"], capture_output=True, text=True,
                          encoding="utf-8",
                          env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    found = [dict(word.split("=") for word in line.split()) for line in done.stdout.splitlines()]
    assert {(row["target"], row["call"], row["kernel"]) for row in found} == set(itertools.product(
        map(str, TARGETS), [f"{move}-{size}" for move in ("expand", "compact") for size in (2, 4)],
        ("_count_parts", "_move_parts"))) | {(str(target), "product", "_matvec") for target in TARGETS}
    for row in found:
        assert row["LOCAL"] == row["STACK"] == "0", row  # nothing is spilled
        assert int(row["REG"]) <= 96, row  # a multiprocessor holds five programs at a time
        assert float(row["instructions"]) <= 22, row
