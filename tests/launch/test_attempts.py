"""How a stage's processes end, which of their endings counts, and when a job runs again."""

import argparse
import errno
import fcntl
import signal
import subprocess
import time

import pytest

from sparse_train.config import RunConfig
from sparse_train.config.load import load_config
from sparse_train.errors import UserError
from sparse_train.jobs.job import Stopped
from sparse_train.launch.run.cluster import ClusterConfig
from sparse_train.launch.run.folder import freeze, read_run
from sparse_train.launch.run.lock import locked
from sparse_train.launch.run.stages import find_stage
from sparse_train.launch.worker import attempts, process, requeue
from sparse_train.launch.worker.attempts import AttemptRecord, Superseded
from sparse_train.launch.worker.endings import Ending, newest_ending, read_ending, write_ending
from sparse_train.launch.worker.failures import run_to_ending
from sparse_train.launch.worker.process_info import Attempt, ProcessInfo, current_attempt
from sparse_train.launch.worker.requeue import reason_to_run_again
from sparse_train.launch.worker.staging import check_inputs
from tests.launch.test_pipeline import RECIPE


def _process(attempt="7.0", rank=0, num_ranks=3):
    return ProcessInfo(rank, num_ranks, rank, num_ranks, "node1", ("node1",), Attempt.parse(attempt))


@pytest.mark.parametrize("given, told", [
    ({0: "finished", 1: "finished", 2: "finished"}, ("finished", 0)),
    ({0: "lost", 1: "mistake", 2: "lost"}, ("mistake", 1)),
    ({0: "lost", 2: "broken"}, ("broken", 2)),  # rank 1 was ended with the step
    ({0: "lost", 2: "lost"}, ("lost", 1)),  # the killed one says nothing
    ({0: "stopped", 1: "stopped"}, ("stopped", 0)),
    ({}, ("lost", 0)),
])
def test_the_ending_nearest_to_the_cause_counts(given, told, tmp_path):
    for rank, status in given.items():
        write_ending(tmp_path, Attempt("7", 0), Ending(status, f"says {rank}", rank))
    found = read_ending(tmp_path, Attempt("7", 0), 3)
    assert (found.status, found.rank) == told


def test_endings_of_an_earlier_attempt_do_not_count(tmp_path):
    write_ending(tmp_path, Attempt("7", 0), Ending("finished", "", 0))
    assert read_ending(tmp_path, Attempt("7", 1), 1).status == "lost"
    assert newest_ending(tmp_path, [AttemptRecord(id="7.1", job="7", ranks=1, from_step=0)]) is None


def test_an_older_attempt_must_not_write(tmp_path):
    logs = tmp_path / "logs" / "dense"
    attempts.begin(logs, _process("7.0"), 0)
    attempts.require_newest(logs, Attempt("7", 0))
    attempts.begin(logs, _process("7.1"), 20)
    with pytest.raises(Superseded, match=r"7\.1 works"):
        attempts.require_newest(logs, Attempt("7", 0))
    assert [record.from_step for record in attempts.read_attempts(logs)] == [0, 20]


@pytest.fixture
def run(tmp_path):
    config = load_config(RunConfig, RECIPE, [f"folder='{tmp_path}'"])
    config.path.mkdir()
    freeze(config, ClusterConfig(executor="slurm", tries=2))
    return config.path


def _tried(run, status, *from_steps):
    logs = run / "logs" / "dense"
    logs.mkdir(parents=True)
    for restarts, step in enumerate(from_steps):
        if restarts:
            attempts.note_requeue(logs, Attempt("7", restarts - 1))
        attempts.begin(logs, _process(f"7.{restarts}", num_ranks=1), step)
    attempt = Attempt("7", len(from_steps) - 1)
    write_ending(logs, attempt, Ending(status, "why", 0))
    return reason_to_run_again(run, "dense", attempt, 76)


@pytest.mark.parametrize("status, from_steps, again", [
    ("stopped", (0,), True), ("lost", (0,), True), ("mistake", (0,), False), ("broken", (0,), False),
    ("lost", (0, 0), False), ("lost", (0, 0, 20), True), ("stopped", (0, 20, 40), True), ("stopped", (0, 0, 0), True),
])
def test_a_job_runs_again_while_it_gets_further(status, from_steps, again, run, capsys):
    assert bool(_tried(run, status, *from_steps)) == again
    assert f"{status}: rank 0 why" in capsys.readouterr().out


def test_requeues_of_slurm_itself_do_not_count(run):
    """Preempted twice, and a node that went down; what this has requeued is what counts."""
    logs = run / "logs" / "dense"
    for restarts in range(4):
        attempts.begin(logs, _process(f"7.{restarts}", num_ranks=1), 0)
    assert reason_to_run_again(run, "dense", Attempt("7", 3), 137) == "after attempt 1 of 2 from the same step"
    attempts.note_requeue(logs, Attempt("7", 3))
    attempts.begin(logs, _process("7.4", num_ranks=1), 0)
    assert reason_to_run_again(run, "dense", Attempt("7", 4), 137) is None


def test_a_stopped_stage_without_state_has_so_many_attempts(run):
    logs = run / "logs" / "compress"
    reasons = []
    for attempt in (Attempt("7", 0), Attempt("7", 1)):
        attempts.begin(logs, _process(str(attempt), num_ranks=1), 0)
        write_ending(logs, attempt, Ending("stopped"))
        reasons.append(reason_to_run_again(run, "compress", attempt, 75))
        attempts.note_requeue(logs, attempt)
    assert reasons == ["after attempt 1 of 2 from the same step", None]


def test_where_the_ranks_were_is_said_with_the_loss():
    def time_out():
        error = RuntimeError("[gloo] Timed out waiting 6000ms for recv operation to complete")
        error.add_note("no progress for 3 s: rank 1 (node1) in fetch (text.py:40)")
        raise error

    ending = run_to_ending(time_out, 0)
    assert ending.status == "lost" and "Timed out" in ending.message and "rank 1 (node1) in fetch" in ending.message


def test_a_batch_script_that_came_back_late_requeues_nothing(run, capsys):
    """Its node was cut off; SLURM has long since run the job again elsewhere."""
    logs = run / "logs" / "dense"
    logs.mkdir(parents=True)
    for restarts in range(2):
        attempts.begin(logs, _process(f"7.{restarts}", num_ranks=1), 0)
    assert reason_to_run_again(run, "dense", Attempt("7", 0), 137) is None
    assert "runs again already" in capsys.readouterr().out


def test_two_jobs_on_one_stage_do_not_requeue_each_other(run, capsys):
    logs = run / "logs" / "dense"
    for job in (7, 8):
        attempts.begin(logs, _process(f"{job}.0", num_ranks=1), 0)
    assert reason_to_run_again(run, "dense", Attempt("7", 0), 1) is None
    assert "job 8 works on this stage" in capsys.readouterr().out
    assert reason_to_run_again(run, "dense", Attempt("8", 0), 137)


def test_restarts_of_a_job_around_it_are_not_those_of_a_local_run(monkeypatch):
    monkeypatch.setattr("submitit.JobEnvironment", lambda: argparse.Namespace(job_id="7"))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    assert current_attempt() == Attempt("7", 0)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    assert current_attempt() == Attempt("7", 2)


def test_attempts_of_earlier_jobs_do_not_count(run):
    logs = run / "logs" / "dense"
    logs.mkdir(parents=True)
    for job in (4, 5, 6):
        attempts.begin(logs, _process(f"{job}.0", num_ranks=1), 0)
    attempts.begin(logs, _process("7.0", num_ranks=1), 0)
    assert reason_to_run_again(run, "dense", Attempt("7", 0), 137)


@pytest.mark.parametrize("state, requeued", [
    ("RUNNING", ["scontrol", "requeue", "12_3"]), ("COMPLETING", None), ("PENDING", None),
])
def test_a_task_of_an_array_is_requeued_by_its_own_id(state, requeued, run, monkeypatch):
    """The bare number of one task is that of the whole array."""
    asked = []

    def answer(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, f"{state}\n")

    for key, value in {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "12",
                       "SLURM_ARRAY_TASK_ID": "3"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(subprocess, "run", answer)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert requeue.main(str(run), "dense", 76) == 76
    assert asked[0][:4] == ["squeue", "-h", "-j", "12_3"] and (asked[1] if asked[1:] else None) == requeued
    assert (run / "logs" / "dense" / "requeues").is_file() == bool(requeued)  # SLURM's own do not count


def test_half_a_line_of_a_node_that_died_is_left_out(tmp_path):
    attempts.begin(tmp_path, _process("7.0"), 0)
    with open(tmp_path / "attempts.jsonl", "a") as file:
        file.write('{"id": "7.')
    assert [record.id for record in attempts.read_attempts(tmp_path)] == ["7.0"]


@pytest.mark.parametrize("code, restarts, again", [(1, 0, False), (137, 0, True), (137, 1, False)])
def test_a_job_that_ended_before_it_began(code, restarts, again, run):
    for number in range(restarts):
        attempts.note_requeue(run / "logs" / "dense", Attempt("7", number))
    assert bool(reason_to_run_again(run, "dense", Attempt("7", restarts), code)) == again


@pytest.mark.parametrize("warning, left_s, told", [
    ("SIGUSR2", 100, "stage compress met its time limit and keeps no state"), ("SIGUSR2", 3600, None),
    ("SIGTERM", 100, None),
])
def test_a_stage_without_state_that_meets_its_time_limit_is_not_tried_again(warning, left_s, told, run, monkeypatch):
    """A preempted one is."""
    def stopped(*arguments):
        raise Stopped(signal.Signals[warning])

    monkeypatch.setattr(process.StageProcess, "_run_job", stopped)
    monkeypatch.setattr(process, "deadline", lambda: time.time() + left_s)
    config = read_run(run)
    with pytest.raises(UserError if told else Stopped, match=told):
        process.StageProcess(_process(num_ranks=1), config, ClusterConfig(executor="slurm", preflight=False),
                             find_stage(config, "compress"), 0).run()


def test_the_dense_model_of_another_run_that_is_missing_is_named(tmp_path):
    config = load_config(RunConfig, RECIPE, [f"folder='{tmp_path}'", "dense.path=/shared/swept/dense-1/dense"])
    with pytest.raises(UserError, match="stage prune needs /shared/swept/dense-1/dense, which does not exist"):
        check_inputs(find_stage(config, "prune"), config)


def test_storage_without_locks_is_one_line(tmp_path, monkeypatch):
    def no_locks(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(UserError, match=r"is on storage without file locks \(No locks available\)"), locked(tmp_path):
        pass


def test_a_requeued_job_takes_another_port(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    ports = {_process(f"{job}.{restarts}").port for job in range(5000, 5020) for restarts in range(3)}
    assert len(ports) == 60 and all(20_000 <= port < 32_768 for port in ports)
