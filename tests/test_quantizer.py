"""Sparse folders in transformers: from_pretrained computes what the runtime does, and save_pretrained writes it again.

Rows of the table in docs/format.md.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq, pipeline

from sparse_train.compress import export_sparse
from sparse_train.config import EvaluateConfig, PruneConfig
from sparse_train.errors import UserError
from sparse_train.inference import PackedLinear, load
from sparse_train.models import save_model
from sparse_train.pruning import prune
from sparse_train.sparse import TensorFolder, sparsify
from sparse_train.sparse import format as sparse_format
from sparse_train.tasks import generate
from sparse_train.tasks.batch import collate
from tests.environments import python_with
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


def _dense(family, folder):
    """A dense model with the weights of `folder`."""
    model, tensors = tiny_model(family)[0], TensorFolder(folder)
    model.load_state_dict({name: tensors.get(name).float() for name in tensors.names}, strict=False)
    for name in tensors.shapes:
        model.get_submodule(name).weight = torch.nn.Parameter(tensors.get_dense(f"{name}.weight").float())
    return model


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("family", _AUTO)
@torch.no_grad()
def test_a_folder_opens(family, precision, tmp_path):
    """From_pretrained's model and the runtime's compute the same, which is what the dense weights give, but that
    products with codes round activations to eight bits."""
    processor = _export(family, precision, tmp_path / "one", int8_head=precision == "int8")
    model, told = _AUTO[family].from_pretrained(tmp_path / "one", output_loading_info=True)
    assert not any(told.values())
    runtime, examples = load(tmp_path / "one", shared=False), tiny_examples(processor)
    inputs = collate(examples, processor).inputs()
    for each in (model, runtime.model):
        each.tie_weights()  # as lm-evaluation-harness does
    expected, found = _dense(family, tmp_path / "one")(**inputs).logits, runtime.model(**inputs).logits
    assert torch.equal(model(**inputs).logits, found)
    assert (found - expected).norm() < (0.05 if precision.startswith("int") else 1e-5) * expected.norm()
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
    for options in ({}, {"dtype": torch.bfloat16}, {"dtype": "float16"}, {"device_map": "cpu:0"},
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
    with pytest.raises(UserError, match="is written by its save_pretrained"):
        save_model(tmp_path / "part", model, processor)
    assert not (tmp_path / "part").exists()
    answer = pipeline("text-generation", model=str(tmp_path / "one"))("Tom", max_new_tokens=4)
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


_MEMORY = """
import sys
from pathlib import Path
import sparse_train
from sparse_train.inference import load
from transformers import AutoModelForCausalLM
load(sys.argv[1], shared=False)  # what is imported late counts for neither
def of(line): return next(int(row.split()[1]) for row in Path("/proc/self/status").read_text().splitlines()
                          if row.startswith(line))
Path("/proc/self/clear_refs").write_text("5")
before = of("VmRSS")
model = load(sys.argv[2], shared=False).model if sys.argv[3] == "load" else AutoModelForCausalLM.from_pretrained(
    sys.argv[2])
print(of("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_loading_takes_no_more_memory_than_ours(precision, tmp_path, monkeypatch):
    _export("llama", precision, tmp_path / "small")
    model, processor = tiny_model("llama", d_model=768, d_ff=3072)
    model = sparsify(model, prune(model, [], PruneConfig(method="magnitude", sparsity=0.5)))
    export_sparse(model, processor, precision, tmp_path / "large")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    took = {way: int(subprocess.check_output([sys.executable, "-c", _MEMORY, tmp_path / "small", tmp_path / "large",
                                              way])) for way in ("load", "from_pretrained")}
    print(precision, {way: f"{kilobytes / 1e3:.0f} MB" for way, kilobytes in took.items()})
    assert took["from_pretrained"] < 1.1 * took["load"] + 3000, took


_SUMS = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/sums.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}]
"""
_LM_EVAL = ("lm-eval==0.4.13", "DataProperty==1.1.1", "absl-py==2.5.1", "chardet==6.0.0.post1", "evaluate==0.4.6",
            "joblib==1.6.0", "mbstrdecoder==1.1.5", "more-itertools==11.2.1", "narwhals==2.29.0", "nltk==3.10.4",
            "pathvalidate==3.3.1", "pytablewriter==1.2.1", "pytz==2026.6", "rouge-score==0.1.2", "sacrebleu",
            "scikit-learn==1.9.1", "sqlitedict==2.1.0", "tabledata==1.3.5", "tcolorpy==0.1.7", "threadpoolctl==3.8.0",
            "typepy==1.3.5", "word2number==1.1")


@pytest.mark.slow
def test_lm_evaluation_harness_scores_a_folder(tmp_path):
    """By the command line that docs/format.md gives: the log-likelihoods of its answers are those of our model."""
    try:
        python = python_with(tmp_path / "python", *_LM_EVAL)
    except OSError as error:
        pytest.skip(str(error))
    (site,) = (tmp_path / "python").glob("lib/python*/site-packages")
    ours = sysconfig.get_path("purelib")  # where this package is, behind a file of paths
    (site / "ours.pth").write_text(f"import site; site.addsitedir({ours!r})\n", encoding="utf-8")
    docs = [{"question": "1 + 1 =", "choices": ["2", "7"], "label": 0},
            {"question": "2 + 3 =", "choices": ["4", "5"], "label": 1}]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs), encoding="utf-8")
    (tmp_path / "sums.yaml").write_text(_SUMS.replace("FOLDER", str(tmp_path)), encoding="utf-8")
    page = (Path(__file__).parents[1] / "docs" / "format.md").read_text(encoding="utf-8")
    start = re.search(r'python -c "(import sparse_train; .*lm_eval.*)" \\\n', page)[1]
    for family, precision in itertools.product(("llama", "mpt"), ("fp32", "bf16", "int8", "int4")):
        folder, out = tmp_path / f"{family}-{precision}", tmp_path / f"{family}-{precision}-out"
        processor = _export(family, precision, folder)
        subprocess.run([python, "-c", start, "run", "--model", "hf", "--model_args", f"pretrained={folder}", "--tasks",
                        "sums", "--include_path", tmp_path, "--device", "cpu", "--log_samples", "--output_path", out],
                       check=True, env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
                       capture_output=True)
        (samples,) = out.rglob("samples_sums_*.jsonl")
        model = load(folder, shared=False).model
        for line in samples.read_text(encoding="utf-8").splitlines():
            sample = json.loads(line)
            for choice, (found, _) in zip(sample["doc"]["choices"], sample["filtered_resps"], strict=True):
                expected = _log_likelihood(model, processor.tokenizer, sample["doc"]["question"], f" {choice}")
                assert float(found) == pytest.approx(expected, abs=1e-3), folder.name


@torch.no_grad()
def _log_likelihood(model, tokenizer, question, answer):
    tokens = torch.tensor(tokenizer(question + answer).input_ids)
    num = len(tokens) - len(tokenizer(question).input_ids)
    scores = model(tokens[None]).logits[0].log_softmax(-1)
    return float(scores[-num - 1:-1].gather(1, tokens[-num:, None]).sum())
