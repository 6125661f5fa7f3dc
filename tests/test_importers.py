"""Checkpoints of other code become sparse folders: per tensor what they hold, and one line where they cannot."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_train import artifacts
from sparse_train.errors import UserError
from sparse_train.importers import import_model
from sparse_train.importers.dense import Dense
from sparse_train.launch.cli import main
from sparse_train.models import as_folder, family_of, load_model, load_processor, open_model, save_model
from sparse_train.registry import IMPORTERS, Entry
from sparse_train.sparse import TensorFolder, sparse_linears
from tests import test_gguf
from tests.model_types import older_python
from tests.models import tiny_model, tiny_tokenizer

_IDS = torch.tensor([[5, 9, 2, 40, 77]])


def _pruned(folder, pattern=None, dtype=torch.bfloat16, model=None):
    """A dense folder whose prunable linears have zeros, 60% of each or as `pattern` (N, M) says; the model."""
    model, processor = (model or tiny_model("llama")[0]).to(dtype), tiny_tokenizer()
    model.config.dtype = dtype
    with torch.no_grad():
        for linear in family_of(model).dense_linears(model).values():
            kept, size = pattern or (round(0.4 * linear.weight.numel()), linear.weight.numel())
            scores = linear.weight.abs().float().view(-1, size)
            keep = torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, scores.topk(kept).indices, True)
            linear.weight.mul_(keep.view(linear.weight.shape))
    save_model(folder, model, processor)
    return model


def _change(file, **keys):
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def _pack(dense, folder, kind, stem=lambda name: name.removesuffix(".weight"), only=lambda name: "proj" in name):
    """The checkpoint `dense` as compressed-tensors stored it."""
    shutil.copytree(dense, folder)
    packed = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not only(name):
            packed[name] = tensor
            continue
        keep = tensor != 0
        if kind == "sparse-24-bitmask":
            groups = tensor.view(-1, 4).abs().float()
            keep = torch.zeros(groups.shape, dtype=torch.bool).scatter_(1, groups.topk(2).indices, True)
            keep = keep.view(tensor.shape)
        bits = np.packbits(keep.numpy(), axis=-1, bitorder="little")
        parts = {"compressed": tensor[keep], "bitmask": torch.from_numpy(bits), "shape": torch.tensor(tensor.shape)}
        if kind == "sparse-24-bitmask":
            parts |= {"compressed": tensor[keep].view(len(tensor), -1), "shape": parts["shape"][:, None]}
        else:
            counts = keep.sum(-1)
            parts["row_offsets"] = torch.cumsum(counts, 0) - counts
        packed |= {f"{stem(name)}.{part}": data for part, data in parts.items()}
    save_file(packed, folder / "model.safetensors", {"format": "pt"})
    _change(folder / "config.json", quantization_config={
        "quant_method": "compressed-tensors", "version": "0.9.4", "sparsity_config": {"format": kind}})
    return folder


def _require_same(dense, out):
    """`out` holds the tensors of the folder `dense`, in their dtype, and computes its logits; the model of `out`."""
    found, (_, tensors), (_, expected) = load_model(out), open_model(out), open_model(dense)
    for name in expected.names:
        assert torch.equal(tensors.get_dense(name), expected.get(name)), name
        assert tensors.get_dense(name).dtype == expected.get(name).dtype, name
    torch.testing.assert_close(found(_IDS).logits, load_model(dense)(_IDS).logits, rtol=1e-4, atol=1e-5)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zeros_of_a_dense_checkpoint_become_bits(dtype, tmp_path, capsys):
    model = _pruned(tmp_path / "dense", dtype=dtype)
    if dtype == torch.bfloat16:  # in several files
        (tmp_path / "dense" / "model.safetensors").unlink()
        model.save_pretrained(tmp_path / "dense", max_shard_size="50KB")
    assert main(["import", str(tmp_path / "dense"), str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert "14 of 14 linears are sparse: sparsity 0.600, unstructured" in told
    assert "was exactly 0.0 counts as pruned" in told
    found = _require_same(tmp_path / "dense", tmp_path / "out")
    for name, linear in sparse_linears(found).items():
        assert torch.equal(linear.weight.keep, model.get_submodule(name).weight != 0), name
    assert load_processor(tmp_path / "out").tokenizer.encode("Tom") == load_processor(
        tmp_path / "dense").tokenizer.encode("Tom")
    assert artifacts.damage(tmp_path / "out") is None


@pytest.mark.parametrize("kind, pattern", [("sparse-bitmask", None), ("sparse-24-bitmask", (2, 4))])
def test_bits_of_compressed_tensors_stay(kind, pattern, tmp_path, capsys):
    _pruned(tmp_path / "dense", pattern=pattern)
    packed = _pack(tmp_path / "dense", tmp_path / "packed", kind)
    assert main(["import", str(packed), str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out
    assert ("sparsity 0.500, 2:4" if pattern else "sparsity 0.600, unstructured") in told and "0.0" not in told
    _require_same(tmp_path / "dense", tmp_path / "out")
    assert artifacts.read_manifest(tmp_path / "out")["importer"] == "compressed-tensors"


def test_a_kept_zero_of_a_2_4_file_stays_kept(tmp_path):
    _pruned(tmp_path / "dense", pattern=(2, 4))
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0] = 0
    save_file(tensors, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    import_model(str(_pack(tmp_path / "dense", tmp_path / "packed", "sparse-24-bitmask")), tmp_path / "out", 0.25)
    weight = TensorFolder(tmp_path / "out").weight("model.layers.0.mlp.up_proj")
    assert weight.sparsity == 0.5 and (weight.to_dense()[0] == 0).all()


def test_the_oldest_files_pack_every_tensor_under_its_own_name(tmp_path):
    _pruned(tmp_path / "dense")
    packed = _pack(tmp_path / "dense", tmp_path / "packed", "sparse-bitmask", lambda name: name, lambda name: True)
    config = packed / "config.json"
    keys = json.loads(config.read_text())
    config.write_text(json.dumps(keys | {"sparsity_config": keys.pop("quantization_config")["sparsity_config"]}))
    import_model(str(packed), tmp_path / "out", 0.25)
    _require_same(tmp_path / "dense", tmp_path / "out")


def test_a_dense_checkpoint_with_a_section_of_compressed_tensors_is_read_as_dense(tmp_path):
    model = _pruned(tmp_path / "dense")
    _change(tmp_path / "dense" / "config.json", quantization_config={
        "quant_method": "compressed-tensors", "format": "dense", "config_groups": {},
        "sparsity_config": {"format": "dense", "sparsity_structure": "unstructured"}})
    assert torch.equal(load_model(tmp_path / "dense").state_dict()["lm_head.weight"], model.lm_head.weight.float())
    assert import_model(str(tmp_path / "dense"), tmp_path / "out", 0.25).importer == "dense"


def test_a_linear_with_few_zeros_stays_dense_and_one_of_zeros_keeps_a_value(tmp_path, capsys):
    _pruned(tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(file)
    none, all_of_it = (f"model.layers.1.self_attn.{kind}_proj.weight" for kind in "qk")
    tensors[none].fill_(1)
    tensors[all_of_it].zero_()
    save_file(tensors, file, {"format": "pt"})
    assert main(["import", str(tmp_path / "dense"), str(tmp_path / "out")]) == 0
    assert "1 linear has fewer zeros than --min-sparsity 0.25 and stays dense: model.layers.1.self_attn.q_proj" in (
        capsys.readouterr().out)
    model = load_model(tmp_path / "out")
    assert torch.equal(model.get_submodule(none.removesuffix(".weight")).weight, tensors[none].float())
    kept = sparse_linears(model)[all_of_it.removesuffix(".weight")].weight
    assert kept.values.tolist() == [0]


class _Other(Dense):
    """Of another package."""


def test_a_source_of_two_kinds_is_read_as_the_one_that_is_asked_for(tmp_path, monkeypatch):
    _pruned(tmp_path / "dense")
    monkeypatch.setitem(IMPORTERS.entries, "other", Entry(f"{__name__}:_Other"))
    with pytest.raises(UserError, match="can be read as dense and as other; choose one of them by --from"):
        import_model(str(tmp_path / "dense"), tmp_path / "out", 0.25)
    assert import_model(str(tmp_path / "dense"), tmp_path / "out", 0.25, "other").importer == "other"


def _packed(tmp_path, spoil):
    _pruned(tmp_path / "dense")
    packed = _pack(tmp_path / "dense", tmp_path / "packed", "sparse-bitmask")
    tensors = load_file(packed / "model.safetensors")
    spoil(tensors, "model.layers.0.mlp.down_proj")
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    return packed


@pytest.mark.parametrize("spoil, told", [
    (lambda tensors, stem: tensors.pop(f"{stem}.bitmask"), r"down_proj\.bitmask is missing"),
    (lambda tensors, stem: tensors.pop(f"{stem}.shape"), r"down_proj\.shape is missing"),
    (lambda tensors, stem: tensors.update({f"{stem}.compressed": tensors[f"{stem}.compressed"][1:].clone()}),
     "down_proj keeps .* positions by its bits but has .* values"),
    (lambda tensors, stem: tensors.update({f"{stem}.shape": torch.tensor([10**9, 10**9])}),
     "which are not the bits of a tensor of shape"),
    (lambda tensors, stem: tensors.update({f"{stem}.shape": torch.tensor([32, 127])}),
     "has shape .32, 127., but .32, 128. in"),
    (lambda tensors, stem: tensors[f"{stem}.compressed"].fill_(torch.nan), "NaN or infinite"),
    (lambda tensors, stem: tensors.pop("model.norm.weight"), "lacks 1 tensors of a llama model"),
], ids=["bits", "shape", "values", "huge", "other", "nan", "norm"])
def test_a_damaged_file_is_refused_in_one_line(spoil, told, tmp_path):
    packed = _packed(tmp_path, spoil)
    with pytest.raises(UserError, match=told) as error:
        import_model(str(packed), tmp_path / "out", 0.25)
    assert "\n" not in str(error.value) and not list(tmp_path.glob("*out*"))


def test_what_is_not_sparse_or_cannot_be_read_is_refused_in_one_line(tmp_path, capsys):
    model, processor = tiny_model("llama")
    save_model(tmp_path / "dense", model, processor)
    out = tmp_path / "out"

    def refused(source, *options):
        assert main(["import", str(source), str(out), *options]) == 2 and not list(tmp_path.glob("*out*"))
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        return told

    assert "has nothing sparse to import: the linear with the most zeros" in refused(tmp_path / "dense")
    assert "there is no folder" in refused(tmp_path / "nothing here")
    assert "there is no importer torch" in refused(tmp_path / "dense", "--from", "torch")
    assert "--min-sparsity 1.5: it must be above 0" in refused(tmp_path / "dense", "--min-sparsity", "1.5")
    assert "--from gguf: " in refused(tmp_path / "dense", "--from", "gguf")
    _pruned(tmp_path / "pruned")
    packed = _pack(tmp_path / "pruned", tmp_path / "packed", "sparse-bitmask")
    with pytest.raises(UserError, match=r"stores its weights as sparse-bitmask .* sparse-train import"):
        load_model(packed)
    section = json.loads((packed / "config.json").read_text())["quantization_config"]
    _change(packed / "config.json", quantization_config=section | {"config_groups": {"group_0": {}}})
    assert "is quantised (compressed-tensors)" in refused(packed)
    _change(packed / "config.json", quantization_config=section | {
        "config_groups": {"group_0": {}}, "format": "marlin-24", "sparsity_config": {}})
    assert "is marlin-24, weights of few bits in the order of one GPU kernel" in refused(packed)
    import_model(str(tmp_path / "pruned"), out, 0.25)
    assert main(["import", str(out), str(tmp_path / "again")]) == 2
    assert "is a sparse folder of this package already" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "pruned"), str(out)]) == 2
    assert f"{out} exists" in capsys.readouterr().err


def test_zeros_of_a_gguf_file_become_bits_where_its_type_has_zeros(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", tmp_path / "assets")
    model = _pruned(tmp_path / "dense", dtype=torch.float32, model=test_gguf._llama()[0])
    monkeypatch.setattr(test_gguf, "_llama", lambda: (model, tiny_model("llama")[1]))
    test_gguf._write(tmp_path / "tiny.gguf")  # attention in Q8_0; the FFN in Q4_1, whose 16 values need not have a 0
    imported = import_model(str(tmp_path / "tiny.gguf"), tmp_path / "out", 0.25)
    assert imported.importer == "gguf" and {name.split(".")[-2] for name in imported.sparse} == {"self_attn"}
    assert len(imported.sparse) == 8 and 0.59 < imported.sparsity < 0.65
    _require_same(as_folder(tmp_path / "tiny.gguf"), tmp_path / "out")


@pytest.mark.slow
def test_what_compressed_tensors_wrote_is_read_to_the_bit(tmp_path):
    for kind, pattern in (("sparse-bitmask", None), ("sparse-24-bitmask", (2, 4))):
        _pruned(tmp_path / kind / "dense", pattern=pattern)
    try:
        python = older_python(tmp_path / "python")
        subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "compressed-tensors==0.14.0.1", "loguru"],
                       check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no compressed-tensors 0.14: {error}")
    script = Path(__file__).with_name("write_packed.py")
    for kind in ("sparse-bitmask", "sparse-24-bitmask"):
        theirs, ours = tmp_path / kind / "theirs", tmp_path / kind / "ours"
        subprocess.run([python, script, tmp_path / kind / "dense", theirs, kind], check=True, capture_output=True)
        _pack(tmp_path / kind / "dense", ours, kind)  # what the other tests read
        expected, found = (load_file(folder / "model.safetensors") for folder in (theirs, ours))
        assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
        assert import_model(str(theirs), tmp_path / kind / "out", 0.25).importer == "compressed-tensors"
        _require_same(tmp_path / kind / "dense", tmp_path / kind / "out")


@pytest.mark.slow
def test_a_training_starts_from_an_imported_folder_and_keeps_its_zeros(tmp_path):
    _pruned(tmp_path / "dense", pattern=(2, 4))
    out, top = tmp_path / "out", Path(__file__).parents[1]
    import_model(str(_pack(tmp_path / "dense", tmp_path / "packed", "sparse-24-bitmask")), out, 0.25)
    text = (f"task={{name: text, path: '{top / 'LICENSE'}', max_length: 64}}", "evaluate.max_new_tokens=1")
    assert main(["run", str(top / "tests" / "launch" / "tiny.yaml"), f"folder={tmp_path}", f"model.path={out}", *text,
                 "--stages", "dense"]) == 0
    before, after = (sparse_linears(load_model(folder)) for folder in (out, tmp_path / "tiny" / "dense"))
    for name, linear in before.items():
        assert torch.equal(linear.bitmask, after[name].bitmask) and not torch.equal(linear.values, after[name].values)


@pytest.mark.slow
def test_importing_takes_the_memory_of_a_few_tensors(tmp_path):
    """However many there are."""
    model, _ = tiny_model("llama")
    _pruned(tmp_path / "small", model=model, dtype=torch.float32)
    config = type(model.config)(**model.config.to_dict() | {
        "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "head_dim": 128})
    _pruned(tmp_path / "large", model=type(model)(config), dtype=torch.float32)
    largest, size = 4 * 2048 * 512, (tmp_path / "large" / "model.safetensors").stat().st_size
    _pack(tmp_path / "large", tmp_path / "packed", "sparse-bitmask")
    script = """if True:
        import sys
        from pathlib import Path
        from sparse_train.importers import import_model
        from sparse_train.sparse import format
        format._FILE_BYTES = 1  # a tensor per file
        def memory(key):
            return next(1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
        for source in sys.argv[1:]:  # the first is for what every model loads of code
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
            before = memory("VmRSS")
            import_model(source, Path(f"{source}-out"), 0.25)
            print(memory("VmHWM") - before)"""
    output = subprocess.run([sys.executable, "-c", script, *(tmp_path / name for name in ("small", "large", "packed"))],
                            check=True, capture_output=True, text=True).stdout
    _, *peaks = map(int, output.split())
    # Of each its zeros, and indices of its values in int64; and what reading a larger model takes of code.
    assert 16 * largest < 0.5 * size and max(peaks) < 16 * largest, peaks
