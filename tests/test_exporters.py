"""Models in formats of other software compute what the folder computes that they were made from."""

import signal
import subprocess

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from sparse_train.compress import QUANTISERS, export_sparse
from sparse_train.inference import load
from sparse_train.kernels import scale_of_columns
from sparse_train.launch.cli import main
from sparse_train.models import load_model, load_processor, own_tensors, save_model
from sparse_train.registry import EXPORTERS
from sparse_train.sparse import BitmaskTensor, sparsify
from tests.environments import python_with
from tests.models import tiny_model

_PROMPT = torch.arange(5, 25)[None]


def sparse_folder(folder, family, precision, int8_head=False, **size):
    """Write a folder at `precision` and return its tensors by their names in the dense model, float32: what the codes
    and values stand for, computed plainly."""
    model, processor = tiny_model(family, **size)
    expected = {name: tensor.detach().clone() for name, tensor in own_tensors(model).items()}
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            weights[name] = BitmaskTensor.from_dense(module.weight.detach(), torch.rand(module.weight.shape) < 0.5)
    head = {}
    if int8_head:
        weight = model.lm_head.weight.detach()
        head = {"lm_head": BitmaskTensor.from_dense(weight, torch.ones_like(weight, dtype=torch.bool))}
    for name, weight in (weights | head).items():
        dense = weight.to_dense()
        if precision in QUANTISERS:
            codes, scale = QUANTISERS["int8" if name in head else precision].nearest(weight)
            dense = codes.to_dense().float() * (
                scale[:, None] if scale.ndim == 1 else scale_of_columns(scale, dense.shape[1]))
        expected[f"{name}.weight"] = dense
    export_sparse(sparsify(model, weights), processor, precision, folder, int8_head)
    if precision == "bf16":
        expected = {name: tensor.bfloat16().float() for name, tensor in expected.items()}
    return expected


def _export(folder, to, out, *options):
    assert main(["export", str(folder), "--to", to, str(out), *options]) == 0


@pytest.mark.parametrize(("family", "precision", "int8_head", "options"), [
    ("llama", "fp32", False, ()), ("llama", "int4", True, ()), ("mpt", "int8", True, ()), ("mpt", "bf16", False, ()),
    ("llama", "int8", False, ("--type", "bf16"))])
def test_a_dense_export_is_the_weights_with_zeros_in_place(tmp_path, capsys, family, precision, int8_head, options):
    expected = sparse_folder(tmp_path / "sparse", family, precision, int8_head)
    _export(tmp_path / "sparse", "dense", tmp_path / "dense", *options)
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'dense'}: ")
    dtype = torch.bfloat16 if "bf16" in (precision, *options) else torch.float32
    ours, theirs = load_model(tmp_path / "dense"), AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert theirs.dtype == dtype
    for name, tensor in expected.items():
        assert torch.equal(ours.get_parameter(name), tensor.to(dtype).float()), name
        assert torch.equal(theirs.get_parameter(name), tensor.to(dtype)), name
    logits, found = load(tmp_path / "sparse", shared=False).model(_PROMPT).logits, theirs.float()(_PROMPT).logits
    # The kernels of int8 and int4 round activations to 8 bits.
    assert (found - logits).norm() <= (0.02 if precision in QUANTISERS else 1e-5) * logits.norm()
    assert load_processor(tmp_path / "dense").tokenizer.encode("Tom has 3") == load_processor(
        tmp_path / "sparse").tokenizer.encode("Tom has 3")


_WIDE = {"d_model": 128, "d_ff": 256}


def _from_compressed(folder, config):
    """Tensors of a compressed-tensors folder by their names in the dense model."""
    stored = load_file(folder / "model.safetensors")
    for name in [name.removesuffix("_scale") for name in stored if name.endswith("_scale")]:
        scale = stored.pop(f"{name}_scale")
        if config["format"] == "pack-quantized":
            words, shape = stored.pop(f"{name}_packed"), stored.pop(f"{name}_shape")
            codes = torch.stack([(words >> 4 * place & 15) - 8 for place in range(8)], 2).reshape(*shape)
        else:
            codes = stored[name]
            assert codes.dtype == torch.int8
        stored[name] = codes * scale.repeat_interleave(codes.shape[1] // scale.shape[1], 1)
    return stored


_COMPRESSED = [("llama", "int8", {}, None), ("mpt", "int4", {"d_model": 128}, None), ("llama", "int4", _WIDE, None),
               ("llama", "int8", _WIDE, "w4a16"), ("llama", "bf16", {}, "w8a8"), ("t5", "fp32", {}, "w8a8")]


@pytest.mark.parametrize(("family", "precision", "size", "type_"), _COMPRESSED)
def test_codes_are_those_of_the_folder_or_the_nearest(tmp_path, family, precision, size, type_):
    expected = sparse_folder(tmp_path / "sparse", family, precision, **size)
    _export(tmp_path / "sparse", "compressed-tensors", tmp_path / "out", *(("--type", type_) if type_ else ()))
    config = AutoConfig.from_pretrained(tmp_path / "out").quantization_config
    group = config["config_groups"]["group_0"]
    is_w8a8 = (type_ or {"int8": "w8a8", "int4": "w4a16"}[precision]) == "w8a8"
    assert (config["format"], group["weights"]["num_bits"], bool(group["input_activations"])) == (
        ("int-quantized", 8, True) if is_w8a8 else ("pack-quantized", 4, False))
    found = _from_compressed(tmp_path / "out", config)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # Half a step; with four bits a whole one, as there is no code 8 for a value as large as that of code -8.
        error = 0.0 if type_ is None or tensor.ndim == 1 else tensor.abs().max() / (253 if is_w8a8 else 7.9)
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=float(error), msg=name)
        assert not found[name][tensor == 0].any(), name


_READ_COMPRESSED = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
for folder in sys.argv[1:]:
    auto = AutoModelForSeq2SeqLM if "t5" in folder else AutoModelForCausalLM
    model, prompt = auto.from_pretrained(folder), torch.arange(5, 25)[None]
    inputs = {"decoder_input_ids": prompt} if "t5" in folder else {}
    with torch.no_grad():
        logits = model(prompt, **inputs).logits
    save_file({"logits": logits} | {name: tensor.clone() for name, tensor in model.named_parameters()
                                    if tensor.is_floating_point()}, f"{folder}/read.safetensors")
"""


@pytest.mark.slow
def test_compressed_tensors_computes_the_model(tmp_path):
    """Its own package, through transformers: weights to the bit, logits within the rounding of activations."""
    try:
        python = python_with(tmp_path / "python", "compressed-tensors==0.20.0", "loguru")
    except OSError as error:
        pytest.skip(str(error))
    expected = {}
    for family, precision, size, type_ in _COMPRESSED:
        folder = tmp_path / f"{family}-{precision}-{type_}-{len(size)}"
        weights = sparse_folder(folder / "sparse", family, precision, **size)
        _export(folder / "sparse", "compressed-tensors", folder / "out", *(("--type", type_) if type_ else ()))
        expected[folder] = weights, type_
    subprocess.run([python, "-c", _READ_COMPRESSED, *(folder / "out" for folder in expected)], check=True)
    for folder, (weights, type_) in expected.items():
        found = load_file(folder / "out" / "read.safetensors")
        ours = load(folder / "sparse", shared=False).model
        inputs = {"decoder_input_ids": _PROMPT} if "t5" in folder.name else {}
        logits = ours(_PROMPT, **inputs).logits
        assert (found.pop("logits") - logits).norm() <= (0.02 if type_ != "w4a16" else 0.2) * logits.norm()
        config = AutoConfig.from_pretrained(folder / "out").quantization_config
        stored = _from_compressed(folder / "out", config)
        for name in weights:
            assert torch.equal(found[name], stored[name]), name


def test_an_export_that_cannot_be_is_one_line_and_leaves_nothing(tmp_path, capsys):
    save_model(tmp_path / "dense", *tiny_model("mpt"))
    (tmp_path / "there").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    there, out = tmp_path / "there", tmp_path / "out"
    for arguments, told in (
            ((tmp_path / "dense", "--to", "dense", there), f"{there} exists, and is left as it is"),
            ((tmp_path / "dense", "--to", "tflite", out), "--to: there is no export format tflite; choose from: dense"),
            ((tmp_path / "dense", "--to", "dense", out, "--type", "w8a8"),
             "--type w8a8: dense stores no such type; choose from: fp32, bf16, fp16"),
            ((tmp_path / "dense", "--to", "compressed-tensors", out),
             "dense is fp32, which compressed-tensors would round; add --type w8a8 or --type w4a16"),
            ((tmp_path / "dense", "--to", "compressed-tensors", out, "--type", "w4a16"),
             "transformer.blocks.0.attn.Wqkv has 32 columns, and scales of w4a16 are those of 128"),
            ((tmp_path / "nowhere", "--to", "dense", out), "there is no folder"),
            ((tmp_path / "empty", "--to", "dense", out), "empty")):
        assert main(["export", *map(str, arguments)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert told in line
    assert there.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "there", "empty"}


def test_a_signal_leaves_nothing_half_written(tmp_path, monkeypatch):
    def write(source, out, type_):
        out.mkdir()
        (out / "half").touch()
        signal.raise_signal(signal.SIGTERM)

    save_model(tmp_path / "dense", *tiny_model("mpt"))
    monkeypatch.setattr(EXPORTERS, "load", lambda name: write)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        assert main(["export", str(tmp_path / "dense"), "--to", "dense", str(tmp_path / "out")]) == 130
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
