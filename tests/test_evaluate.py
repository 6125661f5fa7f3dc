"""The job that scores models, in both precisions, on any number of ranks, undisturbed and stopped."""

import os
import signal
import weakref
from pathlib import Path

import pytest
import torch

from sparse_train.artifacts import write_json
from sparse_train.compat.deepspeed import local_part
from sparse_train.config import PruneConfig, RunConfig
from sparse_train.jobs import evaluate, report
from sparse_train.jobs.job import Input, Job, Stopped, finished_file
from sparse_train.jobs.ledger import num_finished
from sparse_train.launch.run.stages import build_stages
from sparse_train.models import load_model, save_model
from sparse_train.pruning import prune
from sparse_train.sparse import sparse_linears, sparsify
from tests.models import tiny_model
from tests.ranks import run_ranks

_LICENSE = Path(__file__).parents[1] / "LICENSE"


def _config(task, texts=True, **given):
    prose = {"prose": {"path": str(_LICENSE), "max_length": 48, "test_share": 0.5}}
    return RunConfig(task={"name": task}, prune={"sparsity": 0.5}, evaluate={
        "num_examples": 8, "batch_size": 4, "max_new_tokens": 3, "texts": prose if texts else {}, "num_texts": 4,
        **given})


def _job(config, models, folder, progress=lambda *_: None):
    """As the stage gets it; the pruned model stands for a fine-tune as well."""
    stages = {stage.id: stage for stage in build_stages(config)}
    folder.mkdir(exist_ok=True)
    return Job(config, stages["evaluate"], folder, tuple(Input(stages[name], models / path) for name, path in (
        ("dense", "dense"), ("prune", "prune"), ("finetune/squarehead", "prune"))), progress)


def _models(family, folder):
    """A dense model and its pruned one, as the stages dense and prune leave them."""
    model, processor = tiny_model(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)  # so that predictions are decisive
    save_model(folder / "dense", model, processor)
    weights = prune(model, [], PruneConfig(method="magnitude", sparsity=0.5))
    save_model(folder / "prune", sparsify(model, weights), processor)


def _watch_memory(monkeypatch, num_models):
    """A progress that fails where a model's sparse weights live beside its dense ones; fails where more than
    `num_models` models are loaded at a time."""
    models, layers = [], []

    def load(*arguments):
        assert sum(model() is not None for model in models) < num_models
        model = load_model(*arguments)
        models.append(weakref.ref(model))
        layers.extend(map(weakref.ref, sparse_linears(model).values()))
        return model

    monkeypatch.setattr(evaluate, "load_model", load)
    return lambda *_: [pytest.fail("a sparse layer lives on") for layer in layers if layer()]


@pytest.mark.parametrize(("family", "task"), [("llama", "numbers"), ("whisper", "dialtones")])
def test_scores_in_bf16_are_those_in_fp32_but_for_rounding(family, task, tmp_path, monkeypatch):
    """No more models are held than check_ranks counts."""
    _models(family, tmp_path)
    texts = family == "llama"
    found = {}
    for precision in ("fp32", "bf16"):
        config, folder = _config(task, texts, precision=precision), tmp_path / precision
        stages = {stage.id: stage for stage in build_stages(config)}
        evaluate.run(_job(config, tmp_path, folder, _watch_memory(monkeypatch, 1 + texts)))
        write_json(tmp_path / "scores.json", {"loss": "squarehead", "scores": {}, "num_bytes": {"dense": 1}})
        scored = (Input(stages["evaluate"], folder), Input(stages["compress"], tmp_path))
        data = report._collect(Job(config, stages["report"], tmp_path, scored, lambda *_: None))
        table = report._score_table(data)
        assert [row[table.header.index("computed in")] for row in table.rows] == [precision] * 3
        found[precision] = {(row["loss"], row["metric"]): row["value"] for row in data["scores"]}
    names = ["cross_entropy", *["prose/perplexity"] * texts]
    for key in [(loss, name) for loss in ("dense", "one-shot") for name in names]:
        assert found["bf16"][key] == pytest.approx(found["fp32"][key], rel=2.0**-7), key
        assert found["bf16"][key] != found["fp32"][key], key


class _Killed(Exception):
    pass


def _kill_after(num_rounds):
    def progress(done, total, note):
        seen.append(done)
        if len(seen) == num_rounds:
            raise _Killed

    seen = []
    return progress


def _watch_shards(monkeypatch):
    """Fails where a model that is not the dense one has memory when another is loaded."""
    models, load_one = [], evaluate.load_sharded

    def load(*arguments):
        assert not any(part.numel() for model in models[1:] for whole in model.parameters()
                       for part in (whole, local_part(whole)))
        models.append(load_one(*arguments))
        return models[-1]

    monkeypatch.setattr(evaluate, "load_sharded", load)


def _evaluate_on_ranks(config, models, killed):
    """On each rank: undisturbed, into a folder of its own, and with models in shards; then what a process that was
    killed left in `killed`, stopped once more by a signal that one rank gets, and finished."""
    torch.set_num_threads(1)
    evaluate.run(_job(config, models, models / "undisturbed"))
    sharded = config.evaluate.model_copy(update={"placement": "sharded"})
    with pytest.MonkeyPatch.context() as patched:
        _watch_shards(patched)
        evaluate.run(_job(config.model_copy(update={"evaluate": sharded}), models, models / "sharded"))
    before = num_finished(killed)
    with pytest.raises(Stopped):
        evaluate.run(_job(config, models, killed, lambda *_: os.kill(os.getpid(), signal.SIGTERM)))
    added = num_finished(killed) - before
    evaluate.run(_job(config, models, killed))
    return added


def _results(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_one_rank_and_three_undisturbed_and_stopped_give_the_same_files(tmp_path):
    _models("llama", tmp_path)
    config, num_threads = _config("numbers", batch_size=1, num_examples=5), torch.get_num_threads()
    torch.set_num_threads(1)  # products of another number of threads may round differently
    try:
        evaluate.run(_job(config, tmp_path, tmp_path / "one"))
        killed = tmp_path / "killed"
        with pytest.raises(_Killed):  # on texts of the one-shot model, after those of the dense one
            evaluate.run(_job(config, tmp_path, killed, _kill_after(5 + 4 + 5 + 2)))
    finally:
        torch.set_num_threads(num_threads)
    assert num_finished(killed) == 16
    with open(finished_file(killed), "ab") as file:
        file.write(b'["prune on prose", 2, [3, 0.\xff')
    # Of the round with text 0, 1 and 2 only the last is missing.
    assert run_ranks(_evaluate_on_ranks, 3, config, tmp_path, killed) == [1, 1, 1]
    expected = _results(tmp_path / "one")
    assert set(expected) == {"scores.json", "dense.jsonl", "prune.jsonl", "finetune-squarehead.jsonl"}
    assert _results(tmp_path / "undisturbed") == _results(tmp_path / "sharded") == _results(killed) == expected
