"""BitmaskTensor and its files: exact round trips at odd shapes and every dtype; damage is found and named."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_train.errors import UserError
from sparse_train.sparse import BitmaskTensor, TensorFolder, pack_nibbles, write_tensors

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
    assert (weight.dtype, weight.device) == (dtype, dense.device)
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


@pytest.mark.parametrize("dense, keep", [(torch.ones(3), None), (torch.ones(2, 2), torch.ones(2, 3, dtype=torch.bool))])
def test_shapes_that_make_no_weight(dense, keep):
    with pytest.raises(ValueError, match="shape"):
        BitmaskTensor.from_dense(dense, keep)


def _stored(folder, dtype=torch.float32):
    dense, keep = _weight((5, 70), torch.int8 if dtype == "int4" else dtype)
    weight = BitmaskTensor.from_dense(dense // 16 if dtype == "int4" else dense, keep)
    scale = {torch.int8: {"a.scale": torch.ones(5)}, "int4": {"a.scale": torch.ones(5, 1).bfloat16()}}.get(dtype, {})
    values = pack_nibbles(weight.values) if dtype == "int4" else weight.values
    tensors = {"a.values": values, "a.bitmask": weight.bitmask, "b.weight": torch.ones(3), **scale}
    write_tensors(folder, tensors.items(), {"a": weight.shape})
    return weight


@pytest.mark.parametrize("dtype", [*DTYPES, "int4"], ids=str)
def test_files_round_trip(dtype, tmp_path):
    weight = _stored(tmp_path, dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["sparse.safetensors"]
    folder = TensorFolder(tmp_path)
    read = folder.weight("a")
    assert folder.names == ["b.weight"] and folder.shapes == {"a": (5, 70)}
    assert torch.equal(read.values, weight.values) and torch.equal(read.bitmask, weight.bitmask)
    assert read.values.dtype == weight.dtype and read.shape == (5, 70)


def test_another_model_in_the_same_folder_replaces_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr("sparse_train.sparse.format._FILE_BYTES", 16)
    _stored(tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    write_tensors(tmp_path, {"b.weight": torch.ones(3)}.items(), {})
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert TensorFolder(tmp_path).names == ["b.weight"]


def test_modes_of_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        _stored(tmp_path)
    finally:
        os.umask(before)
    assert (tmp_path / "sparse.safetensors").stat().st_mode & 0o777 == 0o640


def _rewrite(file, change):
    tensors = load_file(file)
    header = {"format": "pt", "sparse_train": json.dumps({"version": 1, "shapes": {"a": [5, 70]}})}
    change(tensors, header)
    save_file(tensors, file, header)


def _shapes(shape):
    return lambda t, h: h.update(sparse_train=json.dumps({"version": 1, "shapes": {"a": shape}}))


def _put(name, change):
    return lambda t, h: t.update({name: change(t[name].clone()).contiguous()})


def _set(tensor, where, value):
    tensor[where] = value
    return tensor


@pytest.mark.parametrize("change, told", [
    (_put("a.values", lambda t: t[:-1]), "positions by its bits but has"),
    (_put("a.values", lambda t: t[:0]), r"a.values is F32 \(0,\)"),
    (_put("a.values", lambda t: t[None]), "a.values is F32"),
    (_put("a.values", lambda t: t.double()), "a.values is F64"),
    (_put("a.values", lambda t: t.to(torch.int8)), "a.scale is not there"),
    (_put("a.values", lambda t: _set(t, 2, float("nan"))), "a.values holds values that are NaN or infinite"),
    (_put("a.bitmask", lambda t: t[:, :8]), "the file is damaged"),
    (_put("a.bitmask", lambda t: t.to(torch.int8)), "a.bitmask is I8"),
    (_put("a.bitmask", lambda t: _set(t, (4, 15), 128)), "a.bitmask has bits behind its 70 columns"),
    (lambda t, h: t.pop("a.bitmask"), "a.bitmask is missing"),
    (lambda t, h: t.update({"a.scale": torch.ones(5)}), "a.scale is F32"),
    (lambda t, h: t.update({"c": torch.ones(5, dtype=torch.uint16)}), "c is stored as U16"),
    (lambda t, h: t.update({"c": torch.ones(5).to(torch.float8_e4m3fn)}), "c is stored as F8_E4M3"),
    (lambda t, h: h.update(sparse_train='{"version": 2, "shapes": {}}'), "format version 2"),
    (lambda t, h: h.update(sparse_train="{"), "Invalid JSON"),
    (lambda t, h: h.update(sparse_train="[" * 100_000), "recursion limit"),
    (lambda t, h: h.update(sparse_train="[]"), "should be an object"),
    *((_shapes(shape), "shapes.a") for shape in ([0, 70], [5.0, 70], [True, 70], None, [[5], 70], ["5", 70], [5],
                                                 [5, 70, 1], [-5, 70], "5x70", {"5": 70})),
    (_shapes([10**30, 10**30]), "the file is damaged"),
    (_shapes([5, 700]), "the file is damaged"),
])
def test_a_damaged_file_is_named(change, told, tmp_path):
    _stored(tmp_path)
    _rewrite(tmp_path / "sparse.safetensors", change)
    with pytest.raises(UserError, match=told) as error:
        TensorFolder(tmp_path).weight("a")
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_two_codes_of_four_bits_make_a_byte_the_first_in_its_low_half():
    assert pack_nibbles(torch.tensor([-8, 7, -1], dtype=torch.int8)).tolist() == [0x78, 0x0f]
    assert pack_nibbles(torch.zeros(0, dtype=torch.int8)).tolist() == []


@pytest.mark.parametrize("change, told", [
    (_put("a.values", lambda t: t[:-1]), "keeps 105 positions by its bits but has 52 bytes of codes"),
    (_put("a.values", lambda t: torch.cat([t, t[:1]])), "has 54 bytes of codes"),
    (_put("a.values", lambda t: _set(t, 52, 16)), "a code behind its 105"),
    (_put("a.values", lambda t: t[:0]), r"a.values is U8 \(0,\)"),
    (_put("a.values", lambda t: t[None]), r"a.values is U8 \(1, 53\)"),
    (_put("a.values", lambda t: t.to(torch.int8)), r"a.scale is BF16 \(5, 1\); .* has F32 \(5,\)"),
    (_put("a.scale", lambda t: t.float()), r"a.scale is F32 \(5, 1\); .* has BF16 \(5, 1\)"),
    (_put("a.scale", lambda t: t[:, 0]), r"a.scale is BF16 \(5,\)"),
    (_put("a.scale", lambda t: t.repeat(1, 2)), r"a.scale is BF16 \(5, 2\)"),
    (_put("a.scale", lambda t: _set(t, (3, 0), float("inf"))), "a.scale holds values that are NaN or infinite"),
    (lambda t, h: t.pop("a.scale"), "a.scale is not there"),
    (_put("a.bitmask", lambda t: _set(t, (4, 15), 128)), "by its bits but has|bits behind its 70 columns"),
    (_shapes([10**30, 10**30]), "the file is damaged"),
    (_shapes([5, 700]), "the file is damaged"),
])
def test_a_damaged_file_of_codes_of_four_bits_is_named(change, told, tmp_path):
    _stored(tmp_path, "int4")
    _rewrite(tmp_path / "sparse.safetensors", change)
    with pytest.raises(UserError, match=told) as error:
        folder = TensorFolder(tmp_path)
        folder.weight("a"), folder.scale("a")
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("make, told", [
    (lambda file: file.write_bytes(file.read_bytes()[:100]), r"sparse\.safetensors is damaged"),
    (lambda file: file.write_bytes(file.read_bytes()[:-1]), r"sparse\.safetensors is damaged"),
    (lambda file: file.write_bytes((2**62).to_bytes(8, "little") + b"{}"), r"sparse\.safetensors is damaged"),
    (lambda file: file.write_bytes(b""), r"sparse\.safetensors is damaged"),
    (lambda file: (file.unlink(), file.mkdir()), "not a regular file"),
    (lambda file: (file.unlink(), os.mkfifo(file)), "not a regular file"),
    (lambda file: (file.unlink(), file.symlink_to(file.name)), "not a regular file"),
    (lambda file: os.mkfifo(file.with_name("config.json")), "config.json is not a regular file"),
    (lambda file: save_file({"a": torch.ones(1)}, file.with_name("model.safetensors")), "holds two models"),
    (lambda file: file.unlink(), "is not a checkpoint"),
], ids=["header", "cut", "length", "empty", "folder", "pipe", "loop", "pipe beside", "two", "none"])
def test_a_file_that_is_none_is_named(make, told, tmp_path):
    _stored(tmp_path)
    make(tmp_path / "sparse.safetensors")
    with pytest.raises(UserError, match=told):
        TensorFolder(tmp_path)


@pytest.mark.parametrize("change, told", [
    (lambda m: {**m, "b": "../one.safetensors"}, "must be the name of a file in the same folder"),
    (lambda m: {**m, "b": "/etc/passwd"}, "must be the name of a file in the same folder"),
    (lambda m: {**m, "b": ".."}, "must be the name of a file in the same folder"),
    (lambda m: {**m, "b": "model-00009-of-00002.safetensors"}, "which .*index.json names"),
    (lambda m: {**m, "b": 3}, "weight_map.b: "),
    (lambda m: dict.fromkeys(m, m["a"]), "b is not in model-00001-of-00002"),
    (lambda m: {**m, "c": m["a"]}, "c is not in model-00001-of-00002"),
    (lambda m: [], "weight_map"),
])
def test_an_index_names_tensors_and_files_of_its_folder(change, told, tmp_path, monkeypatch):
    monkeypatch.setattr("sparse_train.sparse.format._FILE_BYTES", 4)
    write_tensors(tmp_path, {"a": torch.ones(1), "b": torch.ones(1)}.items(), {})
    assert set(TensorFolder(tmp_path).names) == {"a", "b"}
    save_file({"a": torch.ones(1)}, tmp_path.parent / "one.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": change(json.loads(index.read_text())["weight_map"])}))
    with pytest.raises(UserError, match=told):
        TensorFolder(tmp_path)


def test_a_tensor_is_in_one_file_and_a_single_file_counts_before_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr("sparse_train.sparse.format._FILE_BYTES", 4)
    write_tensors(tmp_path, {"a": torch.ones(1), "b": torch.ones(1)}.items(), {})
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "model-00002-of-00002.safetensors")
    with pytest.raises(UserError, match="a is in two files"):
        TensorFolder(tmp_path)
    save_file({"c": torch.ones(1)}, tmp_path / "model.safetensors")
    assert TensorFolder(tmp_path).names == ["c"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_ranges_with_values_that_are_not_finite_are_named(value, tmp_path):
    write_tensors(tmp_path, {"a": torch.tensor([[1.0, 2.0], [value, 3.0]]), "s": torch.tensor(5.0)}.items(), {})
    folder = TensorFolder(tmp_path)
    assert folder.get_range("a", 0, 2).tolist() == [1, 2] and folder.get_range("s", 0, 1).tolist() == [5]
    with pytest.raises(UserError, match="a holds values that are NaN or infinite"):
        folder.get_range("a", 1, 3)


def test_what_is_not_allowed_to_be_read_is_named(tmp_path, monkeypatch):
    _stored(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: not os.fspath(path).endswith("sparse.safetensors"))
    with pytest.raises(UserError, match=r"sparse\.safetensors: permission denied"):
        TensorFolder(tmp_path)
    monkeypatch.setattr(os, "scandir", lambda folder: os.open("/nowhere", 0))
    with pytest.raises(UserError, match="cannot read the folder"):
        TensorFolder(tmp_path)
