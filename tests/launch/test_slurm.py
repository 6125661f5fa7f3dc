"""What is asked of SLURM, as whole batch files, and what a hostile config cannot do to them. No SLURM is needed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_train.compat.submitit import batch_text
from sparse_train.config import RunConfig
from sparse_train.config.load import load_config
from sparse_train.errors import UserError
from sparse_train.launch.run import slurm_queue
from sparse_train.launch.run.cluster import ClusterConfig, load_cluster
from sparse_train.launch.run.stages import build_stages
from sparse_train.launch.submit import slurm
from sparse_train.launch.submit.slurm import make_executor

_GOLDEN = Path(__file__).with_name("golden")
_CONFIG = load_config(RunConfig, Path(__file__).parents[2] / "configs" / "demo.yaml", ["folder=/shared/runs"])
_STAGES = {stage.id: stage for stage in build_stages(_CONFIG)}


@pytest.fixture(autouse=True)
def _elsewhere(monkeypatch):
    """As on a login node with its environment in /env."""
    monkeypatch.setattr(sys, "executable", "/env/bin/python")
    found = shutil.which
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name in ("srun", "sbatch") else found(name))


def _text(stage, cluster, runs=(_CONFIG,), after=""):
    executor = make_executor(_STAGES[stage], runs, cluster, Path("/shared/runs/demo/code"), after)
    return batch_text(executor, len(runs))


def _compare(name, text):
    """With the whole file; UPDATE_GOLDEN=1 writes it."""
    file = _GOLDEN / f"{name}.sbatch"
    if os.environ.get("UPDATE_GOLDEN"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text()
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


@pytest.mark.parametrize("stage", _STAGES)
def test_the_batch_file_of_each_stage(stage):
    after = ",".join(f"afterok:{100 + index}" for index in range(len(_STAGES[stage].inputs)))
    _compare(stage.replace("/", "-"), _text(stage, load_cluster("slurm"), after=after))


def test_the_batch_file_of_an_array():
    runs = [_CONFIG.model_copy(update={"folder": "/shared/runs/sweep", "name": name}) for name in ("a", "b", "c")]
    _compare("array", _text("finetune/ce", load_cluster("slurm"), runs, "aftercorr:7"))


_NASTY = "it's \"$(touch pwned)\"; `touch pwned`\n#SBATCH --exclusive \\ & | touch pwned"


def test_values_reach_processes_as_they_are_and_no_shell(tmp_path):
    """The batch file is run with an srun that tells what it is given."""
    folder = tmp_path / "it's; $(touch pwned) \"here\""
    config = _CONFIG.model_copy(update={"folder": str(folder), "name": "run"})
    cluster = ClusterConfig(executor="slurm", environment={"NASTY": _NASTY},
                            sbatch={"comment": "a 'b'; $(touch pwned)"})
    executor = make_executor(_STAGES["prune"], [config], cluster, folder / "run" / "code")
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "srun").write_text("#!/bin/sh\nexec python3 -c 'import json, os, sys; print(json.dumps([dict(os.environ), "
                                "sys.argv[1:]]))' \"$@\"\n")
    (tools / "srun").chmod(0o755)
    (tmp_path / "batch.sh").write_text(batch_text(executor, 1))
    done = subprocess.run(["bash", "batch.sh"], cwd=tmp_path, capture_output=True, text=True,
                          env={"PATH": f"{tools}:{os.environ['PATH']}"})
    environment, arguments = json.loads(done.stdout)
    assert environment["NASTY"] == _NASTY and environment["PYTHONPATH"] == str(folder / "run" / "code")
    assert str(folder / "run" / "logs" / "prune") == arguments[-1]
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("given, said", [
    ({"sbatch": {"comment": "two\nlines"}}, "one line"),
    ({"partition": "a\n#SBATCH --exclusive"}, "one line"),
    ({"sbatch": {"comment x": "y"}}, "is not an option of sbatch"),
    ({"sbatch": {"output": "/x"}}, "set by sparse-train itself"),
    ({"sbatch": {"gpus_per_node": 4}}, "give gpus_per_node"),
    ({"stages": {"bench": {}}}, "there is no stage bench"),
    ({"stages": {"prune": {"tme": "1"}}}, "did you mean stages.prune.time"),
    ({"nodes": 2, "executor": "local"}, "this machine is one node"),
    ({"environment": {"A-B": "c"}}, "environment"),
    ({"environment": {"WANDB_API_KEY": "c"}}, "export it in your shell"),
    ({"environment": {"PYTHONPATH": "c"}}, "the run's own copy of the code"),
    ({"sbatch": {"clusters": "c"}}, "status and cancel ask one cluster"),
])
def test_a_mistake_in_a_cluster_file_is_one_line(given, said, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps({"executor": "slurm", **given}))
    with pytest.raises(UserError, match=said) as error:
        load_cluster(str(file))
    assert "\n" not in str(error.value)


def test_resources_of_a_stage_are_the_most_exact_ones():
    cluster = ClusterConfig(executor="slurm", nodes=4, ranks_per_node=8, gpus_per_node=8, time="10", sbatch={"a": 1},
                            stages={"finetune": {"time": "20", "sbatch": {"b": 2}}, "finetune/ce": {"nodes": 2}})
    ce, dense = cluster.resources(_STAGES["finetune/ce"]), cluster.resources(_STAGES["dense"])
    assert (ce.nodes, ce.time, ce.sbatch, ce.ranks) == (2, "20", {"a": 1, "b": 2}, 16)
    assert (dense.nodes, dense.time, dense.ranks) == (4, "10", 32)
    report = cluster.resources(_STAGES["report"])
    assert (report.ranks, report.gpus_per_node) == (1, 1)


@pytest.mark.parametrize("folder", ["/shared/100%", "/shared/a\nb"])
def test_a_folder_that_slurm_would_misread_is_refused(folder):
    from rich.console import Console

    with pytest.raises(UserError, match="give another folder"):
        slurm.submit(_CONFIG.model_copy(update={"folder": folder}), ClusterConfig(executor="slurm"), [], Console())


def test_without_slurm_it_says_where_to_go(monkeypatch):
    from rich.console import Console

    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="login node"):
        slurm.submit(_CONFIG, ClusterConfig(executor="slurm"), [], Console())


def _answers(monkeypatch, **of):
    """squeue and sacct, as lists of lines."""
    monkeypatch.setattr(slurm_queue, "_run_slurm",
                        lambda command: next(lines for name, lines in of.items() if name in command))


def test_tasks_of_an_array_that_never_started_are_listed_together(monkeypatch):
    _answers(monkeypatch, squeue=[], sacct=["9_[0-1,3%2]|CANCELLED by 0|0:0|None assigned", "9_2|FAILED|1:0|node1"])
    states = slurm_queue.job_states({"a": "9_1", "b": "9_2", "c": "9_3"})
    assert [states[name].state for name in "abc"] == ["CANCELLED", "FAILED", "CANCELLED"]


def test_a_job_between_node_failure_and_requeue_is_not_over(monkeypatch):
    jobs = {"dense": "7", "prune": "8_1", "report": "9"}
    _answers(monkeypatch, squeue=["7|PENDING|BeginTime|", "8_0|RUNNING|None|node1"],
             sacct=["7|NODE_FAIL|0:0|node1", "8_1|CANCELLED by 0|0:15|None assigned"])
    states = slurm_queue.job_states(jobs)
    assert states["dense"].is_active and states["dense"].reason == "BeginTime"
    assert states["prune"].state == "CANCELLED" and not states["prune"].is_active
    assert states["report"].state == "UNKNOWN"
