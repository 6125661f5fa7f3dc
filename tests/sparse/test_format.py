"""BitmaskTensor and its files: exact round trips at odd shapes and every dtype; damage is found and named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_train.errors import UserError
from sparse_train.sparse import BitmaskTensor, TensorFolder, write_tensors

SHAPES = [(1, 1), (3, 5), (7, 63), (2, 64), (5, 65), (4, 128), (3, 200)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]


def _weight(shape, dtype, density=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randint(-127, 128, shape, generator=generator).to(dtype)
    return dense, torch.rand(shape, generator=generator) < density


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_dense_to_sparse_and_back_is_exact(shape, dtype, density):
    dense, keep = _weight(shape, dtype, density)
    weight = BitmaskTensor.from_dense(dense, keep)
    assert weight.values.numel() == int(keep.sum())
    assert torch.equal(weight.keep, keep)
    assert torch.equal(weight.to_dense(), torch.where(keep, dense, torch.zeros((), dtype=dtype)))
    assert weight.num_bytes == keep.sum() * dense.element_size() + shape[0] * 8 * -(-shape[1] // 64)


def test_bits_lie_as_documented():
    keep = torch.zeros(2, 70, dtype=torch.bool)
    keep[1, [0, 9, 69]] = True
    bitmask = BitmaskTensor.from_dense(torch.ones(2, 70), keep).bitmask
    assert bitmask.shape == (2, 16) and not bitmask[0].any()
    assert {int(i): int(bitmask[1, i]) for i in bitmask[1].nonzero()} == {0: 1, 1: 2, 8: 32}


def test_a_kept_zero_stays_a_kept_position_and_a_pruned_one_is_plus_zero():
    weight = BitmaskTensor.from_dense(torch.tensor([[0.0, -2.0, 3.0]]), torch.tensor([[True, False, True]]))
    assert weight.values.tolist() == [0.0, 3.0]
    assert torch.equal(torch.signbit(weight.to_dense()), torch.zeros(1, 3, dtype=torch.bool))


def test_rows_are_sliced_without_copying():
    dense, keep = _weight((9, 70), torch.float32)
    weight = BitmaskTensor.from_dense(dense, keep)
    part = weight.slice_rows(2, 6)
    assert torch.equal(part.to_dense(), weight.to_dense()[2:6])
    assert part.values.untyped_storage().data_ptr() == weight.values.untyped_storage().data_ptr()


@pytest.mark.parametrize("dense, keep", [(torch.ones(3), None), (torch.ones(2, 2), torch.ones(2, 3, dtype=torch.bool))])
def test_shapes_that_make_no_weight(dense, keep):
    with pytest.raises(ValueError, match="shape"):
        BitmaskTensor.from_dense(dense, keep)


def _stored(folder, dtype=torch.float32):
    dense, keep = _weight((5, 70), dtype)
    weight = BitmaskTensor.from_dense(dense, keep)
    write_tensors(folder, {"a.values": weight.values, "a.bitmask": weight.bitmask, "b.weight": torch.ones(3)}.items(),
                  {"a": weight.shape})
    return weight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_files_round_trip(dtype, tmp_path):
    weight = _stored(tmp_path, dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["sparse.safetensors"]
    folder = TensorFolder(tmp_path)
    read = folder.weight("a")
    assert folder.names == ["b.weight"] and folder.shapes == {"a": (5, 70)}
    assert torch.equal(read.values, weight.values) and torch.equal(read.bitmask, weight.bitmask)
    assert read.values.dtype == dtype and read.shape == (5, 70)


def _rewrite(file, change):
    tensors = load_file(file)
    header = {"format": "pt", "sparse_train": json.dumps({"version": 1, "shapes": {"a": [5, 70]}})}
    change(tensors, header)
    save_file(tensors, file, header)


@pytest.mark.parametrize("change, told", [
    (lambda t, h: t.update({"a.values": t["a.values"][:-1]}), "positions by its bits but has"),
    (lambda t, h: t.update({"a.bitmask": t["a.bitmask"][:, :8].contiguous()}), "the file is damaged"),
    (lambda t, h: t.pop("a.bitmask"), "a.bitmask is missing"),
    (lambda t, h: h.update(sparse_train='{"version": 2, "shapes": {}}'), "format version 2"),
    (lambda t, h: h.update(sparse_train="{"), "damaged"),
], ids=["values", "bitmask", "missing", "version", "header"])
def test_a_damaged_file_is_named(change, told, tmp_path):
    _stored(tmp_path)
    _rewrite(tmp_path / "sparse.safetensors", change)
    with pytest.raises(UserError, match=told) as error:
        TensorFolder(tmp_path).weight("a")
    assert str(tmp_path) in str(error.value)


def test_a_truncated_file_is_named(tmp_path):
    _stored(tmp_path)
    file = tmp_path / "sparse.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"sparse\.safetensors is damaged"):
        TensorFolder(tmp_path)
