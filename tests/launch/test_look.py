"""What status and runs show of a run, by its files and by what SLURM answers."""

import argparse
import subprocess

import pytest
from rich.console import Console
from sparse_train.launch import attempts, look
from sparse_train.launch.attempts import Ending
from sparse_train.launch.cluster import ClusterConfig
from sparse_train.launch.look import look_at, read_files
from sparse_train.launch.place import Place
from sparse_train.launch.runner import freeze
from sparse_train.launch.slurm import read_jobs
from sparse_train.launch.stages import build_stages, log_folder

from sparse_train.config import RunConfig
from sparse_train.config_file import load_config
from tests.launch.test_pipeline import RECIPE


def _run(folder, name, *overrides, jobs=()):
    """A run whose stages have the jobs 10, 11, ..., as far as named."""
    config = load_config(RunConfig, RECIPE, [f"folder='{folder}'", f"name={name}", *overrides])
    config.path.mkdir()
    freeze(config, ClusterConfig(executor="slurm"))
    for number, stage in enumerate(build_stages(config), 10):
        if stage.id in jobs:
            logs = log_folder(stage, config)
            logs.mkdir(parents=True)
            (logs / "job").write_text(str(number))
    return config


@pytest.fixture
def slurm(monkeypatch):
    """The questions asked of it, and a dict to put its answers into: program -> lines."""
    asked, answers = [], {"squeue": [], "sacct": []}

    def answer(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, "".join(
            f"{line}\n" for name, lines in answers.items() if name in command for line in lines), "")

    monkeypatch.setattr(subprocess, "run", answer)
    return asked, answers


def _states(config):
    return {found.stage.id: found.state for found in look_at([read_files(config)], Console())[0]}


def test_all_runs_are_one_question(slurm, tmp_path):
    asked, answers = slurm
    runs = [_run(tmp_path, "a", jobs=["dense"]), _run(tmp_path, "b", jobs=["prune"])]
    answers["squeue"] = ["10|RUNNING|None|node1", "11|PENDING|Priority|"]
    found = look_at([read_files(config) for config in runs], Console())
    assert found[0][0].state == "running" and found[0][0].nodes == "node1"
    assert found[1][0].state == "not done yet" and found[1][1].state == "waiting (Priority)"
    assert len(asked) == 1 and asked[0][4] == "10,11"


def test_what_slurm_has_forgotten_is_told_by_the_files(slurm, tmp_path):
    config = _run(tmp_path, "a", jobs=["dense"])
    logs = tmp_path / "a" / "logs" / "dense"
    attempts.begin(logs, Place(0, 1, 0, 1, "node1", ("node1",), "10.0"), 0)
    attempts.write_ending(logs, "10.0", Ending("mistake", "too large", 0))
    assert _states(config)["dense"] == "failed: too large"


def test_what_waited_for_the_dense_model_of_a_sweep_is_held(slurm, tmp_path):
    config = _run(tmp_path, "a", "dense.path=/shared/swept/dense-1/dense", jobs=["prune", "finetune/ce"])
    slurm[1]["sacct"] = [f"{job}|CANCELLED by 0|0:0|None assigned" for job in read_jobs(config.path).values()]
    states = _states(config)
    assert states["prune"] == "held: dense-1/dense did not finish"
    assert states["finetune/ce"] == "held: prune did not finish"


def test_one_job_may_stand_in_two_runs(slurm, tmp_path):
    """Such as a copied folder."""
    slurm[1]["squeue"] = ["10|RUNNING|None|node1"]
    runs = [read_files(_run(tmp_path, name, jobs=["dense"])) for name in "ab"]
    assert [looks[0].state for looks in look_at(runs, Console())] == ["running", "running"]


def test_runs_are_listed_where_there_is_no_slurm_and_others_are_broken(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    _run(tmp_path, "a", jobs=["dense"])
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.yaml").write_text("sparsty: 1\n")
    torn = _run(tmp_path, "torn").path / "dense"
    torn.mkdir()
    (torn / "DONE").touch()
    (torn / "manifest.json").write_text("{")
    look._runs(argparse.Namespace(folder=tmp_path), Console(width=300))
    lines = capsys.readouterr().out.splitlines()
    assert "squeue does not answer" in lines[0] and "below is what the files say" in lines[0]
    shown = {line.split()[0]: line for line in lines}
    assert "dense: not done yet" in shown["a"] and "is missing" in shown["old"] and "cannot read" in shown["torn"]
