"""The job that scores models, in both precisions."""

from pathlib import Path

import pytest
import torch

from sparse_train.artifacts import write_json
from sparse_train.config import PruneConfig, RunConfig
from sparse_train.jobs import evaluate, report
from sparse_train.jobs.job import Input, Job
from sparse_train.launch.run.stages import build_stages
from sparse_train.models import save_model
from sparse_train.pruning import prune
from sparse_train.sparse import sparsify
from tests.models import tiny_model

_LICENSE = Path(__file__).parents[1] / "LICENSE"


def _models(family, folder):
    """A dense model and its pruned one, as the stages dense and prune leave them."""
    model, processor = tiny_model(family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)  # so that predictions are decisive
    save_model(folder / "dense", model, processor)
    weights = prune(model, [], PruneConfig(method="magnitude", sparsity=0.5))
    save_model(folder / "prune", sparsify(model, weights), processor)


@pytest.mark.parametrize(("family", "task"), [("llama", "numbers"), ("whisper", "dialtones")])
def test_scores_in_bf16_are_those_in_fp32_but_for_rounding(family, task, tmp_path):
    _models(family, tmp_path)
    texts = {"prose": {"path": str(_LICENSE), "max_length": 48, "test_share": 0.5}} if family == "llama" else {}
    found = {}
    for precision in ("fp32", "bf16"):
        config = RunConfig(task={"name": task}, prune={"sparsity": 0.5}, evaluate={
            "precision": precision, "num_examples": 8, "batch_size": 4, "max_new_tokens": 3, "texts": texts,
            "num_texts": 4})
        stages, folder = {stage.id: stage for stage in build_stages(config)}, tmp_path / precision
        # The pruned model stands for a fine-tune as well.
        inputs = tuple(Input(stages[name], tmp_path / path) for name, path in (
            ("dense", "dense"), ("prune", "prune"), ("finetune/squarehead", "prune")))
        folder.mkdir()
        evaluate.run(Job(config, stages["evaluate"], folder, inputs, lambda *_: None))
        write_json(tmp_path / "scores.json", {"loss": "squarehead", "scores": {}, "num_bytes": {"dense": 1}})
        scored = (Input(stages["evaluate"], folder), Input(stages["compress"], tmp_path))
        data = report._collect(Job(config, stages["report"], tmp_path, scored, lambda *_: None))
        table = report._score_table(data)
        assert [row[table.header.index("computed in")] for row in table.rows] == [precision] * 3
        found[precision] = {(row["loss"], row["metric"]): row["value"] for row in data["scores"]}
    names = ["cross_entropy", *["prose/perplexity"] * bool(texts)]
    for key in [(loss, name) for loss in ("dense", "one-shot") for name in names]:
        assert found["bf16"][key] == pytest.approx(found["fp32"][key], rel=2.0**-7), key
        assert found["bf16"][key] != found["fp32"][key], key
