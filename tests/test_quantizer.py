"""Sparse folders in transformers: from_pretrained computes what the runtime does, and save_pretrained writes it again.

The rows of the table in docs/models.md.
"""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq, pipeline

from sparse_train.compress import export_sparse
from sparse_train.config import EvaluateConfig, PruneConfig
from sparse_train.errors import UserError
from sparse_train.inference import PackedLinear, load
from sparse_train.pruning import prune
from sparse_train.sparse import format as sparse_format
from sparse_train.sparse import sparsify
from sparse_train.tasks import generate
from sparse_train.tasks.batch import collate
from tests.models import tiny_examples, tiny_model

_AUTO = {"mpt": AutoModelForCausalLM, "llama": AutoModelForCausalLM, "t5": AutoModelForSeq2SeqLM,
         "whisper": AutoModelForSpeechSeq2Seq}


def _export(family, precision, folder, **options):
    """The processor of a tiny sparse model that `folder` holds then."""
    model, processor = tiny_model(family)
    model = sparsify(model, prune(model, [], PruneConfig(method="magnitude", sparsity=0.5)))
    export_sparse(model, processor, precision, folder, **options)
    return processor


def _text(folder, name):
    return (folder / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("family", _AUTO)
@torch.no_grad()
def test_from_pretrained_computes_what_the_runtime_does(family, precision, tmp_path):
    processor = _export(family, precision, tmp_path / "one", int8_head=precision == "int8")
    model, told = _AUTO[family].from_pretrained(tmp_path / "one", output_loading_info=True)
    assert not any(told.values())
    runtime, examples = load(tmp_path / "one", shared=False), tiny_examples(processor)
    inputs = collate(examples, processor).inputs()
    assert torch.equal(model(**inputs).logits, runtime.model(**inputs).logits)
    assert generate(model, processor, examples, EvaluateConfig(max_new_tokens=6)) == runtime.generate(examples, 6)
    for name, saved in (("two", model), ("three", runtime.model)):
        saved.save_pretrained(tmp_path / name)
        for file in ("sparse.safetensors", "generation_config.json"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "one" / file).read_bytes(), file
        assert json.loads(_text(tmp_path / name, "config.json")) == json.loads(_text(tmp_path / "one", "config.json"))


@torch.no_grad()
def test_shards_dtypes_and_devices_change_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sparse_format, "_FILE_BYTES", 20_000)
    processor = _export("llama", "bf16", tmp_path / "one")
    assert len(list((tmp_path / "one").glob("sparse-*.safetensors"))) > 2
    inputs = collate(tiny_examples(processor), processor).inputs()
    expected = load(tmp_path / "one", shared=False).model(**inputs).logits
    for options in ({}, {"dtype": torch.bfloat16}, {"dtype": "float16"}, {"device_map": "cpu"},
                    {"device_map": {"": "cpu"}}, {} if torch.cuda.is_available() else {"device_map": "auto"}):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "one", **options)
        assert model.dtype == torch.float32 and torch.equal(model(**inputs).logits, expected), options
    (tmp_path / "two").mkdir()
    (tmp_path / "two/sparse.safetensors").touch()
    model.save_pretrained(tmp_path / "two")
    model.save_pretrained(tmp_path / "one")  # where it was read from
    for file in (tmp_path / "one").glob("sparse*"):
        assert (tmp_path / "two" / file.name).read_bytes() == file.read_bytes()
    assert {file.name for file in (tmp_path / "two").glob("*.safetensors*")} == {
        file.name for file in (tmp_path / "one").glob("*.safetensors*")}
    with pytest.raises(UserError, match=r"LlamaModel .*save the whole one"):
        model.model.save_pretrained(tmp_path / "part")
    with pytest.raises(UserError, match="leave state_dict out"):
        model.save_pretrained(tmp_path / "part", state_dict={})
    answer = pipeline("text-generation", model=model, tokenizer=processor.tokenizer)("Tom", max_new_tokens=4)
    assert len(answer[0]["generated_text"]) > len("Tom")


def test_folders_that_cannot_be_opened_are_one_line(tmp_path):
    _export("llama", "int8", tmp_path)
    text = _text(tmp_path, "config.json")
    for change, auto, options, told in (
            ({"version": 2}, AutoModelForCausalLM, {}, "version 2 in 'sparse.safetensors', .*update sparse-train"),
            ({"weights": "../x.safetensors"}, AutoModelForCausalLM, {}, "update sparse-train"),
            ({}, AutoModel, {}, "is a LlamaForCausalLM, not a LlamaModel"),
            ({}, AutoModelForCausalLM, {"device_map": {"": "meta"}}, "lies on one device"),
            ({}, AutoModelForCausalLM, {"device_map": {"model": "cpu", "lm_head": "disk"}}, "lies on one device")):
        config = json.loads(text)
        config["quantization_config"] |= change
        (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
        with pytest.raises(UserError, match=told) as error:
            auto.from_pretrained(tmp_path, **options)
        assert "\n" not in str(error.value)


_LATER = """
import sys
import torch
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except OSError as error:
    print(error, file=sys.stderr)
import sparse_train
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""


def test_without_this_package_transformers_refuses_and_names_it(tmp_path):
    _export("llama", "int4", tmp_path)
    done = subprocess.run([sys.executable, "-c", _LATER, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == PackedLinear.__name__
    assert "got sparse-train" in done.stderr and "no file named model.safetensors" in done.stderr
    light = "import sys, sparse_train; print({'torch', 'transformers', 'pydantic'} & sys.modules.keys())"
    assert subprocess.check_output([sys.executable, "-c", light], text=True).strip() == "set()"
