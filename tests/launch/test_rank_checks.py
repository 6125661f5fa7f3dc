"""Checks between ranks before a training: each problem is one line, the same on every rank."""

import dataclasses
import shutil
import threading
from collections import namedtuple

import pytest

from sparse_train import dist
from sparse_train.config import FinetuneConfig, RunConfig, TrainConfig
from sparse_train.config.load import load_config
from sparse_train.errors import UserError
from sparse_train.launch.run.cluster import ClusterConfig
from sparse_train.launch.run.stages import find_stage
from sparse_train.launch.worker import rank_checks, ranks
from sparse_train.launch.worker.endings import EXIT_CODES
from sparse_train.launch.worker.process import StageProcess
from sparse_train.launch.worker.process_info import Attempt, ProcessInfo
from sparse_train.launch.worker.rank_checks import check_ranks, checkpoint_bytes, state_bytes
from tests.launch.test_pipeline import RECIPE
from tests.ranks import run_ranks

_Usage = namedtuple("_Usage", "total used free")


def _change_info(**changes):
    this_rank = rank_checks._this_rank
    rank_checks._this_rank = lambda process: dataclasses.replace(this_rank(process), **changes)


def _look(folder, problem, stage):
    """What check_ranks says on this rank, of a machine with a problem."""
    config = load_config(RunConfig, RECIPE, [f"folder='{folder}'"])
    config.path.mkdir(exist_ok=True)
    host = f"node{dist.rank()}"
    process = ProcessInfo(dist.rank(), dist.world_size(), 0, 1, host, ("node0", "node1"), Attempt("7", 0))
    if problem == "disk" and dist.rank() == 1:
        shutil.disk_usage = lambda path: _Usage(10**9, 10**9, 1000)
    if problem == "memory":
        _change_info(free_memory=1000)
    if problem == "gpu":
        _change_info(gpu_uuid="same")
    if problem == "folder" and dist.rank() == 1:
        config = config.model_copy(update={"folder": str(folder / "of this node alone")})
    if problem == "read-only" and dist.rank() == 1:
        config = config.model_copy(update={"folder": "/proc"})
    try:
        check_ranks(process, config, find_stage(config, stage))
    except UserError as error:
        return str(error)
    return None


@pytest.mark.parametrize("problem, said, stage", [
    (None, None, "finetune/ce"),
    ("disk", "the checkpoints of finetune/ce take", "finetune/ce"),
    ("disk", None, "evaluate"),
    ("memory", "needs 0.0 GB per rank for weights, gradients and optimizer alone; node0", "finetune/ce"),
    ("memory", "evaluate needs 0.0 GB per rank for weights alone; node0", "evaluate"),
    ("gpu", "ranks 0 and 1 have the same GPU", "finetune/ce"),
    ("folder", "does not see what rank", "finetune/ce"),
    ("read-only", "cannot write to /proc/tiny on node1", "finetune/ce"),
])
def test_it_refuses_early_with_one_line_on_every_rank(problem, said, stage, tmp_path):
    told = run_ranks(_look, 2, tmp_path, problem, stage)
    assert told[0] == told[1]
    assert (said in told[0] and "\n" not in told[0]) if said else told[0] is None


def _join(monkeypatch, start, folder, stage, **cluster):
    """As a rank of the stage does, with `start` in place of what meets the other rank."""
    monkeypatch.setattr(dist, "start", start)
    monkeypatch.setattr(ranks, "set_threads", lambda *_: None)
    config = load_config(RunConfig, RECIPE, [f"folder='{folder}'"])
    info = ProcessInfo(1, 2, 0, 1, "node1", ("node0", "node1"), Attempt("7", 0))
    with pytest.raises(_Started) as caught:
        StageProcess(info, config, ClusterConfig(**cluster), find_stage(config, stage), 1)._run_on_ranks()
    return caught.value


class _Started(Exception):
    pass


@pytest.mark.parametrize("stage, limit_s", [("finetune/ce", 1200), ("prune", 86400), ("evaluate", 86400)])
def test_where_ranks_work_apart_they_wait_for_each_other(stage, limit_s, tmp_path, monkeypatch):
    def start(*arguments):
        raise _Started(arguments[-1].total_seconds())

    assert _join(monkeypatch, start, tmp_path, stage).args == (limit_s,)


def test_a_rank_that_never_comes_is_not_waited_for(tmp_path, monkeypatch):
    left, codes = threading.Event(), []

    def start(*_):
        assert left.wait(10)
        raise _Started

    monkeypatch.setattr("os._exit", lambda code: (codes.append(code), left.set()))
    _join(monkeypatch, start, tmp_path, "prune", silence_s=0.01)
    assert codes == [EXIT_CODES["lost"]]


@pytest.mark.parametrize("kinds, limit, used, stat", [
    ("", "memory.max", "memory.current", "anon 5\ninactive_file 1000\n"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "inactive_file 7\ntotal_inactive_file 1000\n"),
])
def test_free_memory_is_what_the_job_may_take(kinds, limit, used, stat, tmp_path, monkeypatch):
    """Its own group has no limit, the one above it has; file cache that can go does not count."""
    monkeypatch.delenv("SLURM_MEM_PER_NODE", raising=False)
    own = tmp_path / "own"
    own.write_text(f"1:cpu:/elsewhere\n0:{kinds}:/job_7/step_0\n")
    job = tmp_path / "cgroup" / kinds / "job_7"
    for folder, most in ((job, "50000"), (job / "step_0", str(2**63 - 4096) if kinds else "max")):
        folder.mkdir(parents=True)
        (folder / limit).write_text(f"{most}\n")
        (folder / used).write_text("20000\n")
        (folder / "memory.stat").write_text(stat)
    assert rank_checks._free_memory(tmp_path / "cgroup", own) == 31_000
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "")  # as some sites have it
    assert rank_checks._free_memory(tmp_path / "cgroup", own) == 31_000
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "1")
    assert rank_checks._free_memory(tmp_path / "none", own) == 1 << 20


@pytest.mark.parametrize("stage, precision, bytes_per_value", [
    (0, "fp32", 4 + 8 + 4), (0, "bf16", 2 + 12 + 4), (1, "bf16", 2 + 4 + 3), (2, "bf16", 2 + 1 + 3),
    (3, "fp32", (4 + 12 + 4) / 4), (3, "bf16", (2 + 12 + 4) / 4),
])
def test_predicted_state(stage, precision, bytes_per_value):
    train = TrainConfig(zero={"stage": stage}, precision=precision)
    assert state_bytes(train, 1_000_000, 4) == bytes_per_value * 1_000_000


def test_checkpoints_of_an_earlier_attempt_are_room(tmp_path, monkeypatch):
    """A requeued job needs no more disk than it had."""
    config = load_config(RunConfig, RECIPE, [f"folder='{tmp_path}'"])
    stage = find_stage(config, "finetune/ce")
    own = config.path / "finetune" / "ce.partial" / "checkpoints" / "step-00000002"
    own.mkdir(parents=True)
    counts = rank_checks.ParameterCounts(1000, 0, (0,))
    needed = checkpoint_bytes(config.finetune, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: _Usage(0, 0, needed - 100))
    with pytest.raises(UserError, match="make room"):
        rank_checks._require_disk(config, stage, counts)
    (own / "rank-00000.safetensors").write_bytes(bytes(100))
    rank_checks._require_disk(config, stage, counts)


def test_predicted_checkpoints():
    assert checkpoint_bytes(FinetuneConfig(checkpoints_kept=2), 10) == 3 * 120 + 40
