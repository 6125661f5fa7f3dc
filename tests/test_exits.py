"""Models in formats of other software compute what the folder computes that they were made from."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparse_train.compress import QUANTISERS, export_sparse
from sparse_train.inference import load
from sparse_train.kernels import scale_of_columns
from sparse_train.launch.cli import main
from sparse_train.models import load_model, load_processor, own_tensors, save_model
from sparse_train.sparse import BitmaskTensor, sparsify
from tests.models import tiny_model

_PROMPT = torch.arange(5, 25)[None]


def _sparse(folder, family, precision, int8_head=False):
    """Write a folder at `precision` and return its tensors by their names in the dense model, float32: what the codes
    and values stand for, computed plainly."""
    model, processor = tiny_model(family)
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
    expected = _sparse(tmp_path / "sparse", family, precision, int8_head)
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
            ((tmp_path / "nowhere", "--to", "dense", out), "there is no folder"),
            ((tmp_path / "empty", "--to", "dense", out), "empty")):
        assert main(["export", *map(str, arguments)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert told in line
    assert there.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "there", "empty"}
