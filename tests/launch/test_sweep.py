"""Sweeps: every combination runs in a folder of its own, from one dense model where they agree on it."""

import json

import pytest
import yaml
from rich.console import Console

from sparse_train import artifacts
from sparse_train.config.load import load_points
from sparse_train.errors import UserError
from sparse_train.launch.cli import main
from sparse_train.launch.run.cluster import ClusterConfig
from sparse_train.launch.submit import sweep
from sparse_train.launch.submit.sweep import print_sweep
from tests.launch.test_pipeline import RECIPE, _cli


def _points(*overrides):
    return load_points(RECIPE, overrides)


def test_every_combination_is_a_run_of_its_own():
    points = _points("sweep={seed: [1, 2], prune.sparsity: [0.5, 0.75], finetune.losses.ce.task_weight: [2]}")
    assert [(point["seed"], config.seed, config.prune.sparsity) for point, config in points] == \
        [(1, 1, 0.5), (1, 1, 0.75), (2, 2, 0.5), (2, 2, 0.75)]
    assert all(config.finetune.losses["ce"].task_weight == 2 and not config.sweep for _, config in points)
    assert str(points[1][1].path) == "runs/tiny/seed-1_sparsity-0.75_task_weight-2"
    assert [point for point, _ in _points()] == [{}]


def test_long_combinations_have_names_that_a_folder_can_have():
    losses = [{name: {"feature_weight": weight} for name in ("ce", "squarehead")} for weight in (1.5, 2.5)]
    points = _points(f"sweep={json.dumps({'seed': [1], 'finetune.losses': losses})}")
    names = [config.name for _, config in points]
    assert len(set(names)) == 2 and all(name.startswith("seed-1_losses-") and len(name) < 100 for name in names)


@pytest.mark.parametrize("given, said", [
    ("sweep={seed: [1, 1]}", "two combinations are called seed-1"),
    ("sweep={seed: []}", "seed has no value"),
    ("sweep={prune.sparsty: [0.5]}", "did you mean prune.sparsity"),
    ("sweep={seed: 3}", "sweep.seed=3"),
    ("sweep={prune.sparsity: [0.5, 1.5]}", "sparsity=1.5 is outside"),
])
def test_a_mistake_in_a_sweep_is_one_line(given, said):
    with pytest.raises(UserError, match=said) as error:
        _points(given)
    assert "\n" not in str(error.value)


def test_the_table_has_means_and_spreads_over_seeds(capsys):
    def row(seed, loss, sparsity, value):
        return {"point": {"seed": seed, "finetune.steps": 10}, "loss": loss, "sparsity": sparsity,
                "metrics": {"exact_match": value, "cross_entropy": 1.0} | ({"books/kl": 0.2} if loss == "ce" else {})}

    table = [row(seed, loss, sparsity, value + seed / 10) for seed in (1, 2, 3)
             for loss, sparsity, value in (("dense", 0.0, 0.5), ("ce", 0.75, 0.1), ("ce", 0.9, 0.0))]
    print_sweep(table, "exact_match", Console(width=200))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == ["steps", "sparsity", "dense", "ce"]
    assert " ".join(lines[2]) == "10 0.75 0.700 ± 0.100 0.300 ± 0.100"
    assert " ".join(lines[3]) == "10 0.90 0.700 ± 0.100 0.200 ± 0.100"
    assert lines[8] == ["books", "kl"] and " ".join(lines[10]) == "10 0.75 - 0.200 ± 0.000"


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """(folder, what the command printed) of a sweep of which one combination fails."""
    folder = tmp_path_factory.mktemp("all sweeps")
    (folder / "random.py").write_text("raise ImportError('a file of the user, who works in this folder')")
    recipe = folder / "swept.yaml"
    recipe.write_text(yaml.safe_dump({
        "extends": str(RECIPE), "folder": str(folder), "name": "swept",
        "prune": {"pattern": "2:4", "sparsity": None, "method": "magnitude"},
        "finetune": {"losses": {"ce": None}, "clip": 0, "warmup_steps": 0, "zero": {"stage": 2}},
        "sweep": {"finetune.learning_rate": [1e30, 1e-3]}}))
    return folder / "swept", _cli("run", recipe, "--stages", "prune,finetune,evaluate", code=1, cwd=folder)[0]


def test_combinations_share_the_dense_model_and_a_failed_one_does_not_stop_the_others(swept):
    """To each of them the dense model, which is the teacher too, is one from outside."""
    folder, _ = swept
    dense = [path for path in folder.glob("dense-*") if (path / "dense" / "DONE").is_file()]
    assert len(dense) == 1
    for point in ("learning_rate-0.001", "learning_rate-1e-30"):
        inputs = artifacts.read_manifest(folder / point / "prune")["inputs"]
        assert inputs["dense"] == str(dense[0] / "dense") and not (folder / point / "dense").exists()
    table = json.loads((folder / "sweep.json").read_text())
    assert {(row["point"]["finetune.learning_rate"], row["loss"], row["sparsity"]) for row in table} == \
        {(0.001, "dense", 0.0), (0.001, "one-shot", 0.5), (0.001, "squarehead", 0.5)}


def test_a_failed_stage_names_its_cause_and_its_log(swept, capsys):
    run = swept[0] / "learning_rate-1e-30"
    assert "learning_rate-1e-30: stage finetune/squarehead failed: rank 0 FloatingPointError: step 2: the gradient's " \
           "norm is" in swept[1].replace("\n", " ")
    log, = (run / "logs" / "finetune" / "squarehead").glob("*_0_log.out")
    assert str(log) in swept[1].replace("\n", "") and "FloatingPointError" in log.read_text()
    shown, _ = _cli("status", run)
    assert [line.split()[:3] for line in shown.splitlines()[1:] if line.startswith("finetune")] == \
        [["finetune/squarehead", "failed:", "FloatingPointError:"]]
    assert main(["logs", str(run), "finetune/squarehead"]) == 0
    assert capsys.readouterr().out == log.read_text()


@pytest.mark.parametrize("swept, after", [("finetune.steps", "afterok"), ("seed", "afterany")])
def test_of_several_dense_models_one_that_fails_does_not_hold_the_others(swept, after, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    points = _points(f"folder={tmp_path}", f"sweep={{{swept}: [2, 3]}}")
    sweep.run_sweep(points, ClusterConfig(executor="slurm"), [], Console(width=200), dry_run=True)
    assert f"prune                  {after}:<dense>" in capsys.readouterr().out


def test_a_sweep_is_counted_without_running(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep.local, "run", None)
    assert main(["run", str(RECIPE), f"folder='{tmp_path}'", "sweep={seed: [1, 2]}", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "seed-1:" in shown and "seed-2:" in shown and "2 combinations, 2 dense models" in shown
