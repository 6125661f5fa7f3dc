"""Whatever happens to a training or a pruning, it ends with the bits of an undisturbed one, and no job is left hanging.

Each test disturbs one of two nodes with two ranks in the middle and lets SLURM and the job do the rest.
"""

import os
import re
import shutil
import signal
import subprocess

import psutil
import pytest

from sparse_train import artifacts
from sparse_train.jobs import prune as prune_job
from sparse_train.jobs.job import Job
from sparse_train.launch.run.folder import read_inputs, read_run
from sparse_train.launch.run.slurm_queue import read_jobs
from sparse_train.launch.run.stages import find_stage
from sparse_train.launch.worker import attempts
from tests.cluster.conftest import (
    LONG,
    STAGES,
    STATE,
    require_same_end,
    submit,
    wait_for,
    wait_for_end,
)
from tests.launch.test_pipeline import RECIPE, _cli
from tests.test_pruning_ranks import one_thread, write_dense

_STAGE = "finetune/squarehead"


def _restarted(run, num_attempts=2, stage=_STAGE):
    wait_for(lambda: len(attempts.read_attempts(run / "logs" / stage)) >= num_attempts, 120, f"attempt {num_attempts}")


def test_the_whole_pipeline_and_its_dependents(undisturbed):
    out, _ = _cli("status", undisturbed)
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [[stage, "done"] for stage in STAGES]
    nodes = attempts.read_attempts(undisturbed / "logs" / _STAGE)[0].nodes
    assert len(set(nodes)) == 2
    log, _ = _cli("logs", undisturbed, _STAGE)
    assert "4 ranks on 2 nodes" in log and "rank    3" in log
    assert "4 ranks on 2 nodes" in _cli("logs", undisturbed, "evaluate")[0]


def test_preempted_by_a_higher_partition(started, undisturbed):
    subprocess.run(["srun", "-p", "urgent", "-N", "3", "--exclusive", "sleep", "1"], check=True, timeout=60)
    assert wait_for_end(started, _STAGE).state == "COMPLETED"
    require_same_end(started, undisturbed, num_attempts=2)


def test_a_killed_node_with_all_on_it(started, undisturbed):
    node = attempts.read_attempts(started / "logs" / _STAGE)[0].nodes[1]
    os.kill(int((STATE / "pids" / f"{node}.pid").read_text()), signal.SIGKILL)
    _restarted(started)
    assert wait_for_end(started, _STAGE).state == "COMPLETED"
    require_same_end(started, undisturbed, num_attempts=2)


@pytest.mark.parametrize("index", [0, 1])
def test_an_unplugged_node(index, started, undisturbed):
    """Its ranks go on running, cut off: they must give up, and must not write where the new attempt does."""
    node = attempts.read_attempts(started / "logs" / _STAGE)[0].nodes[index]
    left = _ranks(started)[2 * index:2 * index + 2]
    subprocess.run(["ip", "link", "set", f"slurm-{node}", "down"], check=True)
    _restarted(started)
    assert wait_for_end(started, _STAGE).state == "COMPLETED"
    require_same_end(started, undisturbed, num_attempts=2)
    logs = "".join(file.read_text() for file in (started / "logs" / _STAGE).glob("*_log.out"))
    # SLURM may bury either side before it has waited that long; whoever gave up names the other side.
    assert re.search(r"giving up: rank \d \(node\d\)(, \d \(node\d\))? went silent for 20 s", logs)
    # The unplugged node's own daemon may not have buried them yet.
    wait_for(lambda: not [pid for pid in left if _lives(pid)], 60, "the end of the cut-off ranks")


@pytest.mark.parametrize("rank", [0, 3])
def test_a_killed_rank(rank, started, undisturbed):
    os.kill(_ranks(started)[rank], signal.SIGKILL)
    _restarted(started)
    assert wait_for_end(started, _STAGE).state == "COMPLETED"
    require_same_end(started, undisturbed, num_attempts=2)


def test_a_killed_rank_of_a_pruning(place, tmp_path):
    """It continues behind the last block, and ends with the bits of one undisturbed process."""
    write_dense(tmp_path, "llama", n_layers=60, max_seq_len=256)
    _cli("run", RECIPE, f"folder='{tmp_path}'", "--on", place, "--stages", "prune", f"dense.path='{tmp_path}/dense'",
         "prune.batch_size=2")
    run = tmp_path / "tiny"
    wait_for((run / "prune.partial" / "checkpoints" / "step-00000005" / artifacts.DONE).is_file, 120, "block 5")
    os.kill(_ranks(run, "prune")[3], signal.SIGKILL)
    _restarted(run, stage="prune")
    assert wait_for_end(run, "prune").state == "COMPLETED"
    records = attempts.read_attempts(run / "logs" / "prune")
    assert len(records) == 2 and len(set(records[1].nodes)) == 2 and 5 <= records[1].from_step < 60
    metrics = artifacts.require_manifest(run / "prune")["metrics"]
    assert len(metrics["peak_memory_gb"]) == records[1].ranks == 4
    config = read_run(run)
    stage = find_stage(config, "prune")
    with one_thread():
        prune_job.run(Job(config, stage, tmp_path / "alone", read_inputs(stage, config), lambda *_: None))
    assert (run / "prune" / "sparse.safetensors").read_bytes() == (tmp_path / "alone/sparse.safetensors").read_bytes()


def test_scancel_and_the_same_command_again(started, undisturbed, place):
    _cli("cancel", started)
    assert wait_for_end(started, _STAGE).state == "CANCELLED"
    out, _ = _cli("status", started)
    assert "cancelled: CANCELLED" in out
    submit(started, place)
    assert wait_for_end(started, _STAGE).state == "COMPLETED"
    require_same_end(started, undisturbed, num_attempts=2)


def test_the_time_limit(undisturbed, pruned, place):
    """A limit of one minute, most of which goes into starting: each try saves in time, and none counts as failed."""
    submit(pruned, place, "cluster.time=1", "cluster.warning_s=5")
    assert wait_for_end(pruned, _STAGE, 500).state == "COMPLETED"
    num_attempts = len(attempts.read_attempts(pruned / "logs" / _STAGE))
    assert num_attempts > 1
    require_same_end(pruned, undisturbed, num_attempts)


def test_a_stage_that_keeps_no_state_says_which_limit_to_raise(undisturbed, place, tmp_path):
    run = tmp_path / "tiny"
    for stage in STAGES[:-2]:
        shutil.copytree(undisturbed / stage, run / stage)
    shutil.copy(undisturbed / "config.yaml", run)  # by which it is known for a run
    _cli("run", RECIPE, f"folder='{tmp_path}'", "--on", place, "--stages", "benchmark,report", *LONG,
         "benchmark.repeats=1000000", "cluster.time=1", "cluster.warning_s=5")
    assert wait_for_end(run, "benchmark").state == "FAILED" and wait_for_end(run, "report").state == "CANCELLED"
    assert len(attempts.read_attempts(run / "logs" / "benchmark")) == 1
    out, _ = _cli("status", run)
    assert "benchmark met its time limit and keeps no state" in out and "cluster.stages.benchmark.time=" in out


def _lives(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def _ranks(run, stage=_STAGE):
    """Their pids on this machine, by rank."""
    started, job = {}, read_jobs(run)[stage]
    for process in psutil.process_iter():
        try:
            given, command = process.environ(), process.cmdline()
        except psutil.Error:
            continue
        # srun has the same words in its command. A rank's helpers, such as wandb's, are later forks of it.
        if given.get("SLURM_JOB_ID") == job and "submitit.core._submit" in command and "python" in command[0]:
            rank, when = int(given["SLURM_PROCID"]), process.create_time()
            started[rank] = min(started.get(rank, (when, process.pid)), (when, process.pid))
    assert sorted(started) == [0, 1, 2, 3]
    return [started[rank][1] for rank in range(4)]
