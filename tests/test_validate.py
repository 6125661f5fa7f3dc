"""What a run is refused for before its first job: a task that is not for the model, lengths that do not fit."""

import copy
import json
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from sparse_train.config import ModelConfig, RunConfig, TaskConfig
from sparse_train.config.load import load_config
from sparse_train.errors import UserError
from sparse_train.hub import hub_answers, may_be_hub_name
from sparse_train.launch.submit.validate import require_data, summarise, validate
from sparse_train.models import build_model, build_processor, check_on_hub, open_model, read_config, save_model
from sparse_train.models.families import whisper
from sparse_train.sparse import TensorFolder
from sparse_train.tasks import build_task
from tests.models import tiny_tokenizer

_CONFIGS = Path(__file__).parents[1] / "configs"


def _run(family, task=None, **more):
    return RunConfig.model_validate({"model": {"family": family, "d_model": 32, "n_layers": 1, "max_seq_len": 512},
                                     "prune": {"sparsity": 0.5}, **({"task": task} if task else {}), **more})


@pytest.mark.parametrize("family, task", [("mpt", "dialtones"), ("t5", "dialtones"), ("whisper", "arithmetic"),
                                          ("whisper", "numbers")])
def test_sound_is_for_speech_models_and_for_them_only(family, task):
    with pytest.raises(UserError, match=rf"^task.name={task} has (sound|text) .* {family} model takes"):
        validate(_run(family, {"name": task}))
    calibration = {"sparsity": 0.5, "calibration": {"name": task}}
    with pytest.raises(UserError, match=rf"^prune.calibration.name={task} has"):
        validate(_run(family, prune=calibration))


    with pytest.raises(UserError, match=rf"^task.mix.task.name={task} has"):
        validate(_run(family, {"mix": {"share": 0.5, "task": {"name": task}}}))


@pytest.mark.parametrize("family", ["t5", "whisper"])
def test_gradients_are_not_read_of_an_encoder_decoder(family):
    with pytest.raises(UserError, match=rf"^pruning by gradients .* decoder-only model, and this {family} model has"):
        validate(_run(family, prune={"sparsity": 0.5, "method": "obert"}))


def test_what_cannot_be_packed_is_refused():
    def refused(match, family="llama", error=UserError, **more):
        with pytest.raises(error, match=match):
            validate(_run(family, more.pop("task", {"pack": True}), **more))

    refused("^task.pack=true: the examples of task.name=arithmetic never end, .* give finetune.num_examples and dense")
    limited = {"dense": {"num_examples": 9}, "finetune": {"num_examples": 9}}
    validate(_run("llama", {"pack": True}, **limited))
    refused("^task.pack=true: a t5 model cannot keep the examples of a window apart", "t5", **limited)
    mix = {"share": 0.5, "task": {"name": "arithmetic", "max_length": 99}}
    refused("the examples of task.mix.task.name=arithmetic never end", task={"pack": True, "mix": mix}, **limited)
    refused("mix.task.max_length=99 is longer than a window, max_length=9; give at most 9", error=ValueError,
            task={"pack": True, "max_length": 9, "mix": mix})
    refused("dense.sequence_parallel=2: ranks that share tokens cannot keep examples of a window", error=ValueError,
            dense={"sequence_parallel": 2})


@pytest.mark.parametrize("family", ["mpt", "t5", "whisper", "llama"])
def test_every_family_has_an_embedded_task(family):
    validate(_run(family))


def test_a_report_needs_matplotlib_and_other_stages_do_not(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    validate(_run("mpt"), ["dense", "prune"])
    with pytest.raises(UserError, match=r"sparse-train\[plots\]"):
        validate(_run("mpt"))


def test_a_run_that_logs_to_wandb_needs_it_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    validate(_run("mpt"))
    with pytest.raises(UserError, match=r"^wandb not installed; pip install 'sparse-train\[wandb\]'$"):
        validate(_run("mpt", tracking={"wandb": {"mode": "offline"}}))


def test_text_has_nothing_for_an_encoder(tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(f"{i} word " * 30 for i in range(400)))
    text = {"name": "text", "path": str(tmp_path)}
    with pytest.raises(UserError, match=r"task.name=text has no prompts"):
        validate(_run("t5", text))
    with pytest.raises(UserError, match=r"^evaluate.texts.books.name=text has no prompts"):
        validate(_run("t5", evaluate={"texts": {"books": text}}))
    validate(_run("mpt", text))


def test_general_text_is_text_that_is_there(tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(f"{i} word " * 30 for i in range(400)))
    validate(_run("mpt", evaluate={"texts": {"books": {"path": str(tmp_path)}}}))
    for text, told in (({"name": "numbers"}, r"^evaluate.texts.books.name=numbers has questions and answers; give"),
                       ({"path": str(tmp_path / "nothing")}, r"^evaluate.texts.books.path=.*nothing: there is no")):
        with pytest.raises(UserError, match=told):
            validate(_run("mpt", evaluate={"texts": {"books": text}}))


def test_a_message_names_the_key_of_its_data(tmp_path):
    missing = {"name": "text", "path": str(tmp_path / "nothing")}
    calibration = {"sparsity": 0.5, "calibration": missing}
    for key, more in (("task", {"task": missing}), ("prune.calibration", {"prune": calibration}),
                      ("task.mix.task", {"task": {"mix": {"share": 0.5, "task": missing}}})):
        with pytest.raises(UserError, match=rf"^{key}.path=.*nothing: there is no"):
            validate(_run("mpt", **more))


def test_tokens_of_a_training_count_what_is_mixed_in(tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(f"{i} word " * 30 for i in range(400)))
    mix = {"share": 0.25, "task": {"name": "text", "path": str(tmp_path), "max_length": 100}}
    config = _run("mpt", task={"max_length": 60, "mix": mix}, finetune={"steps": 10, "batch_size": 4})
    assert summarise(config, validate(config).parameters)[-1].endswith(f"at most {30 * 60 + 10 * 100:,} tokens")


def test_lengths_are_held_against_the_positions():
    for key, value, most in (("evaluate.max_new_tokens", 16, 15), ("benchmark.new_tokens", 16, 15),
                             ("task.max_length", 17, 16)):
        config = load_config(RunConfig, _CONFIGS / "dialtones" / "demo.yaml", [f"{key}={value}"])
        with pytest.raises(UserError, match=f"^{key}={value} .*; give at most {most}$"):
            validate(config)
    validate(load_config(RunConfig, _CONFIGS / "dialtones" / "demo.yaml", ["evaluate.max_new_tokens=15"]))


def test_a_model_of_many_languages_needs_one(tmp_path, monkeypatch):
    size = ModelConfig(family="whisper", d_model=32, n_layers=1, n_heads=2, max_seq_len=448)
    processor = build_processor(size, tiny_tokenizer())
    save_model(tmp_path / "m", build_model(size, processor), processor)
    monkeypatch.setattr(whisper, "MULTILINGUAL", 300)  # tokens, and not more than this one's
    task = {"name": "dialtones", "max_length": 448}
    run = {"dense": {"path": str(tmp_path / "m")}, "evaluate": {"max_new_tokens": 100}}
    with pytest.raises(UserError, match=r"task.language is missing: .* task.language=hindi"):
        validate(_run("whisper", task, **run))
    validate(_run("whisper", task | {"language": "hindi"}, **run))


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch, tmp_path):
    def no_waiting(seconds):
        raise AssertionError("asked again")

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(time, "sleep", no_waiting)
    hub_answers.cache_clear()
    with pytest.raises(UserError, match="cannot read a model config from owner/name"):
        read_config("owner/name")
    with pytest.raises(UserError, match=r"^cannot download owner/name: the hub does not answer"):
        open_model("owner/name")
    with pytest.raises(UserError, match=r"^task.path=owner/name is no file or folder.*the hub does not answer"):
        build_task(TaskConfig(name="gsm8k", path="owner/name")).examples("train", 1)
    assert constants.HF_HUB_OFFLINE
    hub_answers.cache_clear()


@pytest.mark.parametrize("path, is_name", [
    ("gsm8k", True), ("openai/gsm8k", True), ("data/nope", True), ("./nope", False), ("../a/b", False),
    ("a/b/c", False), ("~/nope", False), ("data/nope/", False), ("my data", False), ("data/train.jsonl", False),
    ("model.gguf", False)])
def test_what_may_be_a_name_on_the_hub(path, is_name, monkeypatch):
    assert may_be_hub_name(path) == is_name
    monkeypatch.setattr("sparse_train.hub.hub_answers", lambda: True)
    monkeypatch.setattr("sparse_train.hub.repo_exists", lambda name, repo_type: name == "openai/gsm8k")
    run = _run("mpt", {"name": "gsm8k", "path": path})
    if path == "openai/gsm8k":
        require_data(run)
    else:
        with pytest.raises(UserError, match=f"^task.path={path}: there is no such file or folder") as error:
            require_data(run)
        assert ("on the hub" in str(error.value)) == is_name


def test_data_without_test_rows_is_refused_before_the_first_job(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"question": "q", "answer": "a"}\n')
    (tmp_path / "test.jsonl").write_text("")
    with pytest.raises(UserError, match="has no row of the test split"):
        validate(_run("mpt", {"name": "gsm8k", "path": str(tmp_path)}))


def test_a_dry_run_refuses_an_absolute_path_that_is_not_there(tmp_path):
    config = _run("mpt", {"name": "gsm8k", "path": str(tmp_path / "nope")})
    with pytest.raises(UserError, match="nope"):
        validate(config, dry_run=True)


def _model(folder, tokenizer=None, **size):
    size = ModelConfig(**{"family": "llama", "d_model": 32, "n_layers": 1, "max_seq_len": 96} | size)
    processor = build_processor(size, tiny_tokenizer())
    save_model(folder, build_model(size, processor), processor)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return {"dense": {"path": str(folder)}, "evaluate": {"max_new_tokens": 20}, "benchmark": {"new_tokens": 20}}


def test_a_tokenizer_that_is_not_the_models_is_refused_before_the_first_job(tmp_path):
    larger, endless = copy.deepcopy(tiny_tokenizer()), copy.deepcopy(tiny_tokenizer())
    larger.add_special_tokens({"pad_token": "[PAD]"})
    endless.eos_token = None
    with pytest.raises(UserError, match=r"token ids up to 300, but the model's embedding has only 300 rows"):
        validate(_run("llama", **_model(tmp_path / "larger", larger)))
    with pytest.raises(UserError, match=r"its tokenizer names no end-of-text token"):
        validate(_run("llama", **_model(tmp_path / "endless", endless)))
    unused = copy.deepcopy(tiny_tokenizer())
    unused.add_tokens(["<image>"])  # as of Gemma 3's text models
    validate(_run("llama", **_model(tmp_path / "unused", unused)))


def test_data_of_which_nothing_fits_is_refused_before_the_first_job(tmp_path):
    run = _model(tmp_path / "m")
    for split, words in (("train", 9), ("test", 200)):
        rows = [json.dumps({"question": "word " * words, "answer": "a"})] * 3
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    task = {"name": "gsm8k", "path": str(tmp_path)}
    with pytest.raises(UserError, match=r"no test example is left: 3 of the first 3 test examples do not fit the model "
                                        r"\(96 positions"):
        validate(_run("llama", task, **run))
    (tmp_path / "test.jsonl").write_text(rows[0] + "\n" + json.dumps({"question": "q", "answer": "a"}))
    validate(_run("llama", task, **run))
    for stage in ({"evaluate": {"max_new_tokens": 95}}, {"benchmark": {"new_tokens": 95}}):
        with pytest.raises(UserError, match=r"no test example is left: .*96 positions.*; 95 new tokens"):
            validate(_run("llama", task, **run | stage))
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    with pytest.raises(UserError, match=r"no training example is left"):
        validate(_run("llama", task, **run))


def test_a_model_on_the_hub_is_refused_from_names_before_a_download(tmp_path, monkeypatch):
    size = ModelConfig(family="llama", d_model=32, n_layers=1, n_heads=2)
    processor = build_processor(size, tiny_tokenizer())
    save_model(tmp_path, build_model(size, processor), processor)
    tensors = TensorFolder(tmp_path)
    specs = {name: tensors.spec(name) for name in tensors.names}
    monkeypatch.setattr("sparse_train.models.checkpoint.tensors_on_hub", lambda name: specs)
    config = read_config(tmp_path)
    check_on_hub("owner/name", config)
    del specs["model.norm.weight"]
    with pytest.raises(UserError, match=r"^owner/name lacks 1 tensors of a llama model, such as model\.norm\.weight"):
        check_on_hub("owner/name", config)
