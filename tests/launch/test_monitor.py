"""What status and runs show of a run, by its files and by what SLURM answers."""

import argparse
import ctypes
import os
import shlex
import subprocess
import sys

import pytest
from rich.console import Console

from sparse_train import artifacts
from sparse_train.config import RunConfig
from sparse_train.config.load import load_config
from sparse_train.errors import UserError
from sparse_train.launch.cli import main
from sparse_train.launch.monitor import logs as monitor_logs
from sparse_train.launch.monitor import status
from sparse_train.launch.monitor.state import State, read_files, read_status
from sparse_train.launch.run.cluster import ClusterConfig
from sparse_train.launch.run.folder import freeze, log_folder, progress_file
from sparse_train.launch.run.slurm_queue import read_jobs
from sparse_train.launch.run.sources import sources
from sparse_train.launch.run.stages import build_stages
from sparse_train.launch.worker import attempts
from sparse_train.launch.worker.endings import Ending, read_ending, write_ending
from sparse_train.launch.worker.process_info import Attempt, ProcessInfo
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
    return {found.stage.id: found.text for found in read_status([read_files(config)], Console())[0]}


def test_all_runs_are_one_question(slurm, tmp_path):
    asked, answers = slurm
    runs = [_run(tmp_path, "a", jobs=["dense"]), _run(tmp_path, "b", jobs=["prune"])]
    answers["squeue"] = ["10|RUNNING|None|node1", "11|PENDING|Priority|"]
    found = read_status([read_files(config) for config in runs], Console())
    assert found[0][0].state is State.RUNNING and found[0][0].nodes == "node1"
    assert found[1][0].text == "not done yet" and found[1][1].text == "waiting (Priority)"
    assert len(asked) == 1 and asked[0][4] == "10,11"


def test_what_slurm_has_forgotten_is_read_from_the_files(slurm, tmp_path):
    config = _run(tmp_path, "a", jobs=["dense"])
    logs = tmp_path / "a" / "logs" / "dense"
    attempts.begin(logs, ProcessInfo(0, 1, 0, 1, "node1", ("node1",), Attempt("10", 0)), 0)
    write_ending(logs, Attempt("10", 0), Ending("mistake", "too large", 0))
    assert _states(config)["dense"] == "failed: too large"


def test_following_a_log_goes_on_while_the_result_to_be_replaced_stands(tmp_path, monkeypatch, capsys):
    config = _run(tmp_path, "a")
    result, log = config.path / "dense", config.path / "logs" / "dense" / "1_0_log.out"
    result.mkdir()
    artifacts.sign(result, {"stage": "dense", "sources": {}})
    log.parent.mkdir(parents=True)
    log.write_text("step 1\n")

    def work(_):
        with open(log, "a", encoding="utf-8") as file:
            file.write("step 2\n")
        os.utime(result / artifacts.DONE, (1, 1))  # the new one

    monkeypatch.setattr(monitor_logs, "_is_running", lambda *_: True)
    monkeypatch.setattr(monitor_logs.time, "sleep", work)
    assert main(["logs", str(config.path), "dense", "-f"]) == 0
    assert capsys.readouterr().out == "step 1\nstep 2\n"


def test_what_waited_for_the_dense_model_of_a_sweep_is_held(slurm, tmp_path):
    config = _run(tmp_path, "a", "dense.path=/shared/swept/dense-1/dense", jobs=["prune", "finetune/ce"])
    slurm[1]["sacct"] = [f"{job}|CANCELLED by 0|0:0|None assigned" for job in read_jobs(config.path).values()]
    states = _states(config)
    assert states["prune"] == "held: dense-1/dense did not finish"
    assert states["finetune/ce"] == "held: prune did not finish"


def test_a_finished_stage_that_will_run_again_shows_why_and_no_old_progress(slurm, tmp_path):
    config = _run(tmp_path, "a")
    dense = build_stages(config)[0]
    progress_file(dense, config).parent.mkdir(parents=True)
    progress_file(dense, config).write_text('{"done": 3, "total": 6, "note": "loss 1", "seconds_left": 9}')
    assert status._cells(read_status([read_files(config)], Console())[0][0])[1] == "not done yet, 3/6 loss 1"
    (config.path / "dense").mkdir()
    (config.path / "dense" / "result").touch()
    artifacts.sign(config.path / "dense", {"stage": "dense", "sources": sources(dense, config)})
    changed = config.model_copy(update={"seed": config.seed + 1})
    shown = status._cells(read_status([read_files(changed)], Console())[0][0])
    assert shown[1] == f"seed: {config.seed} -> {changed.seed}"


def test_one_job_may_stand_in_two_runs(slurm, tmp_path):
    """Such as a copied folder."""
    slurm[1]["squeue"] = ["10|RUNNING|None|node1"]
    runs = [read_files(_run(tmp_path, name, jobs=["dense"])) for name in "ab"]
    assert [statuses[0].state for statuses in read_status(runs, Console())] == [State.RUNNING] * 2


def test_runs_are_listed_where_there_is_no_slurm_and_others_are_broken(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    _run(tmp_path, "a", jobs=["dense"])
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.yaml").write_text("sparsty: 1\n")
    torn = _run(tmp_path, "torn").path / "dense"
    torn.mkdir()
    (torn / "DONE").touch()
    (torn / "manifest.json").write_text("{")
    status._runs(argparse.Namespace(folder=tmp_path), Console(width=300))
    lines = capsys.readouterr().out.splitlines()
    assert "squeue does not answer" in lines[0] and "below is what the files say" in lines[0]
    shown = {line.split()[0]: line for line in lines}
    assert "dense: not done yet" in shown["a"] and "is missing" in shown["old"] and "cannot read" in shown["torn"]


def test_a_broken_stage_is_shown_in_its_row(tmp_path):
    """Manifests, endings, attempts, progress and jobs, in ways that no release writes."""
    config = _run(tmp_path, "a")
    for stage, manifest in (("dense", "[]"), ("prune", '{"files": {}, "key": 3, "seconds": "x", "nodes": 4}')):
        (config.path / stage).mkdir()
        (config.path / stage / "DONE").touch()
        (config.path / stage / "manifest.json").write_text(manifest)
    logs = log_folder(build_stages(config)[2], config)
    (logs / "endings" / "7.0").mkdir(parents=True)
    (logs / "endings" / "7.0" / "0.json").write_text('{"status": "lost in space", "message": 3, "rang": 1}')
    (logs / "attempts.jsonl").write_bytes(b'[]\n"x"\n{"id": 7}\n\xff\n'
                                          b'{"id": "7.0", "job": "7", "ranks": 1, "from_step": 0}\n')
    for progress in ("[]", '{"done": "1"}', "\0"):
        (logs / "progress.json").write_text(progress)
        states = _states(config)
        assert states["dense"].startswith("cannot read") and "it is not a manifest" in states["dense"]
        assert states["finetune/ce"] == "not done yet"
    (logs / "job").write_text("7; rm -rf")
    with pytest.raises(UserError, match="not the number of a job"):
        read_files(config)


def test_a_rank_without_an_ending_is_explained_by_the_end_of_its_log(tmp_path):
    for text, kind, told in (("torch.OutOfMemoryError: too large", "broken", "torch.OutOfMemoryError: too large"),
                               ("12/100 loss 1.0", "lost", "killed, or ran out of memory"), ("", "lost", "killed")):
        (tmp_path / "7_0_log.out").write_text(f"{'x' * 5000}\n{text}\n\n")
        ending = read_ending(tmp_path, Attempt("7", 0), 1)
        assert ending.status == kind and told in ending.message


@pytest.mark.parametrize("width", [80, 200])
def test_status_shows_all_at_any_width(width, slurm, tmp_path, capsys):
    config = _run(tmp_path, "a", jobs=["dense", "finetune/squarehead"])
    slurm[1]["squeue"] = ["10|RUNNING|None|node001", "13|PENDING|AssocGrpCPUMinutesLimit|"]
    (log_folder(build_stages(config)[0], config) / "progress.json").write_text(
        '{"done": 120, "total": 2000, "note": "loss 0.1234", "seconds_left": 600.0}')
    status._status(argparse.Namespace(run=config.path, watch=False), Console(width=width))
    shown = capsys.readouterr().out
    together = "".join(shown.split())
    assert max(map(len, shown.splitlines())) <= width
    assert all(text in shown for text in ("finetune/squarehead", "120/2000", "10 min left", "node001"))
    assert "waiting(AssocGrpCPUMinutesLimit)" in together


def _without_root():
    """root's right to open everything is taken away for good; others have none."""
    for right in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, right, 0, 0, 0)  # PR_CAPBSET_DROP


def _in_a_process(commands, **options):
    """(printed, heavy packages that the commands loaded), the commands one after the other."""
    code = f"""import sys
from sparse_train.launch.cli import main
for command in {commands!r}:
    try:
        print("code", main(command), flush=True)
    except SystemExit as leave:
        print("code", leave.code, flush=True)
print([name for name in ("torch", "transformers", "deepspeed", "submitit", "numpy") if name in sys.modules])"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          **options)
    assert done.returncode == 0 and "Traceback" not in done.stdout, done.stdout
    *lines, heavy = done.stdout.splitlines()
    return lines, heavy


def test_looking_loads_nothing_heavy_and_prints_to_any_terminal(tmp_path):
    (tmp_path / "größe").mkdir()
    run = _run(tmp_path / "größe", "a").path
    (run / "logs" / "dense").mkdir(parents=True)
    (run / "logs" / "dense" / "7_0_log.out").write_text("step 1\n")
    lines, heavy = _in_a_process([["--help"], ["run", "--help"], ["status", str(run)], ["runs", str(tmp_path)],
                                  ["cancel", str(run)], ["logs", str(run), "dense"], ["status", str(run.parent / "b")],
                                  ["cancel", str(run.parent / "b")]],
                                 env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert [line for line in lines if line.startswith("code")] == [*["code 0"] * 6, *["code 2"] * 2]
    assert "nothing is running" in lines and "step 1" in lines
    assert all("gr\\xf6\\xdfe" in line and "is not a run folder" in line for line in (lines[-4], lines[-2]))
    assert heavy == "[]"


def test_a_pipe_that_nobody_reads_ends_quietly(tmp_path):
    _run(tmp_path, "a")
    command = shlex.join([sys.executable, "-m", "sparse_train.launch.cli"])
    done = subprocess.run(f"{command} runs {shlex.quote(str(tmp_path))} | true; {command} --help | true", shell=True,
                          capture_output=True)
    assert done.stderr == b""


def test_what_may_not_be_read_is_one_line_and_hides_nothing(tmp_path):
    for name in ("open", "secret", "locked"):
        _run(tmp_path, name)
    (tmp_path / "locked" / "logs").mkdir()
    for path in (tmp_path / "secret", tmp_path / "locked" / "logs"):
        path.chmod(0)
    try:
        lines, _ = _in_a_process([["runs", str(tmp_path)], ["status", str(tmp_path)]], preexec_fn=_without_root)
        shown = "\n".join(lines)
        assert "dense: not done yet" in shown and shown.count("code 0") == 2
        assert shown.count("secret/config.yaml: Permission denied") == 2
        lines, _ = _in_a_process([["status", str(tmp_path / "secret")], ["cancel", str(tmp_path / "secret")],
                                  ["logs", str(tmp_path / "secret"), "dense"]],
                                 preexec_fn=_without_root)
        assert lines[1::2] == ["code 2"] * 3
        assert all("Permission denied; ask its owner" in line for line in lines[::2]), lines
    finally:
        for path in (tmp_path / "secret", tmp_path / "locked" / "logs"):
            path.chmod(0o755)
