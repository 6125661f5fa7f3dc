"""Looking at runs and ending them: status, logs, cancel, runs. All from files and from SLURM's answers, on any node."""

import argparse
import contextlib
import platform
import shlex
import signal
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.live import Live
from sparse_train.launch import attempts, slurm
from sparse_train.launch.runner import LOCK, plan, rank_log
from sparse_train.launch.slurm import JobState, job_states, read_jobs
from sparse_train.launch.stages import CONFIG, Stage, find_stage, log_folder, progress_file, read_run
from sparse_train.launch.sweep import is_dense_of_sweep

from sparse_train import artifacts
from sparse_train.config import RunConfig
from sparse_train.errors import UserError
from sparse_train.tables import make_table, print_table

_HEADER = ("stage", "state", "job", "nodes", "tries", "progress", "", "left")
_WATCH_S, _STATE_WIDTH = 5.0, 50
_ASK_S = 10.0  # between questions to SLURM while a log is followed


def add_commands(commands: argparse._SubParsersAction) -> None:
    status = commands.add_parser("status", help="the stages of a run: state, node, progress")
    status.add_argument("run", type=Path, metavar="RUN", help="such as runs/demo")
    status.add_argument("--watch", action="store_true", help="until Ctrl-C")
    status.set_defaults(command=_status)

    logs = commands.add_parser("logs", help="what a stage printed")
    logs.add_argument("run", type=Path, metavar="RUN")
    logs.add_argument("stage", metavar="STAGE", help="such as finetune/squarehead")
    logs.add_argument("--rank", type=int, default=0, metavar="R")
    logs.add_argument("-f", "--follow", action="store_true", help="go on printing until the stage ends")
    logs.set_defaults(command=_logs)

    cancel = commands.add_parser("cancel", help="end a run's jobs; the same run command goes on from their state")
    cancel.add_argument("run", type=Path, metavar="RUN")
    cancel.set_defaults(command=_cancel)

    runs = commands.add_parser("runs", help="all runs of a folder")
    runs.add_argument("folder", type=Path, nargs="?", default=Path("runs"), metavar="FOLDER")
    runs.set_defaults(command=_runs)


@dataclass(frozen=True)
class Look:
    """A stage as it is now."""

    stage: Stage
    state: str
    """done, running, waiting, failed, cancelled, stopped, not done yet, or why it will run again."""
    job: str = ""
    nodes: str = ""
    tries: int = 0
    progress: dict[str, Any] | None = None

    def cells(self) -> list[str]:
        progress = self.progress or {}
        left = progress.get("seconds_left")
        done = f"{progress['done']}/{progress['total']}" if progress else ""
        state = textwrap.shorten(self.state, _STATE_WIDTH, placeholder=" ...")
        return [self.stage.id, state, self.job, self.nodes, str(self.tries or ""), done, progress.get("note", ""),
                f"{left / 60:.0f} min" if left is not None and self.state == "running" else ""]


@dataclass(frozen=True)
class Files:
    """What a run's files say of its stages."""

    config: RunConfig
    planned: list[tuple[Stage, str]]
    jobs: dict[str, str]


def read_files(config: RunConfig) -> Files:
    """Raises UserError where one of them is broken."""
    return Files(config, plan(config, ["dense"] if is_dense_of_sweep(config) else []), read_jobs(config.path))


def look_at(runs: Sequence[Files], console: Console) -> list[list[Look]]:
    """The stages of each run. SLURM is asked once for all of them, and of nothing that is done; where it does not
    answer, that is printed, and the files alone tell."""
    asked = {(index, stage.id): run.jobs[stage.id] for index, run in enumerate(runs)
             for stage, reason in run.planned if reason != "current" and stage.id in run.jobs}
    try:
        states = job_states(asked)
    except UserError as error:
        console.print(f"{error}; below is what the files say", style="yellow", highlight=False, markup=False,
                      soft_wrap=True)
        states = {}
    return [_look_at(run, {stage: state for (number, stage), state in states.items() if number == index})
            for index, run in enumerate(runs)]


def _look_at(run: Files, states: dict[str, JobState]) -> list[Look]:
    config, jobs, found, failed = run.config, run.jobs, [], []
    for stage, reason in run.planned:
        logs = log_folder(stage, config)
        tried = attempts.read_attempts(logs)
        job, state = jobs.get(stage.id, ""), states.get(stage.id)
        if reason == "current":
            manifest = artifacts.read_manifest(config.path / stage.id)
            found.append(Look(stage, f"done in {manifest['seconds']:.0f} s", job, _short(manifest.get("nodes", ())),
                              len(tried)))
            continue
        progress = None
        with contextlib.suppress(UserError):
            progress = artifacts.read_json(progress_file(stage, config))
        text = _told(config, stage, reason, state, tried, failed)
        if text.startswith(("failed", "cancelled", "held")):
            failed.append(stage.id)
        nodes = state.nodes if state and state.state == "RUNNING" else ""
        found.append(Look(stage, text, job, nodes, len(tried), progress))
    return found


def _told(config: RunConfig, stage: Stage, reason: str, state: JobState | None, tried: list, failed: list[str]) -> str:
    behind = [name for name in stage.inputs if name in failed]
    # The dense model of a sweep is another run's.
    behind += ["/".join(Path(path).parts[-2:]) for path in stage.external.values()
               if Path(path).is_absolute() and not Path(path).is_dir()]
    if state is None or state.state == "UNKNOWN":  # the files alone tell
        newest = attempts.newest_ending(log_folder(stage, config), tried)
        if tried and newest is None and _launcher(config.path) is not None:
            return "running"
        return f"failed: {newest.message}" if newest and newest.status in ("broken", "lost", "mistake") else reason
    if state.is_active:
        if state.state == "PENDING":
            return f"waiting ({state.reason or 'starting'})"
        return state.state.lower()
    if state.state == "CANCELLED" and behind:
        return f"held: {behind[0]} did not finish"
    if state.state == "COMPLETED":
        return reason
    ending = attempts.newest_ending(log_folder(stage, config), tried)
    cause = f"rank {ending.rank} {ending.message}" if ending and ending.status != "finished" else state.reason
    return f"{'cancelled' if state.state == 'CANCELLED' else 'failed'}: {state.state} {cause}"


def _short(nodes) -> str:
    return ",".join(nodes[:2]) + (f" and {len(nodes) - 2} more" if len(nodes) > 2 else "")


def _status(options, console: Console) -> None:
    runs = _below(options.run)
    if not options.watch:
        for config, looks in zip(runs, look_at([read_files(config) for config in runs], console), strict=True):
            _print_run(config, looks, console, len(runs) > 1)
        return
    with Live(console=console, auto_refresh=False) as live, contextlib.suppress(KeyboardInterrupt):
        while True:
            found = look_at([read_files(config) for config in runs], console)
            live.update(make_table(_HEADER, [look.cells() for looks in found for look in looks], 5), refresh=True)
            time.sleep(_WATCH_S)


def _print_run(config: RunConfig, looks: list[Look], console: Console, named: bool) -> None:
    if named:
        console.print(f"[bold]{config.name}", highlight=False)
    print_table(console, _HEADER, [look.cells() for look in looks], 5)
    for look in looks:
        if look.state.startswith("failed"):
            for line in (f"{look.stage.id} {look.state}",
                         f"    sparse-train logs {shlex.quote(str(config.path))} {look.stage.id}"):
                console.print(line, highlight=False, markup=False, soft_wrap=True)


def _below(folder: Path) -> list[RunConfig]:
    """The run in `folder`, or those of a sweep."""
    if (folder / CONFIG).is_file():
        return [read_run(folder)]
    found = [read_run(path.parent) for path in sorted(folder.glob(f"*/{CONFIG}"))]
    return found or [read_run(folder)]


def _logs(options, console: Console) -> None:
    config = read_run(options.run)
    stage = find_stage(config, options.stage)
    file = _log_file(config, stage, options.rank)
    stream, asked = sys.stdout, -_ASK_S
    at_work = options.follow
    with open(file, errors="replace", encoding="utf-8") as opened:
        while True:
            # Asked before reading: what is written until the end is still read.
            if at_work and (config.path / stage.id / artifacts.DONE).is_file():
                at_work = False
            elif at_work and time.monotonic() - asked > _ASK_S:
                at_work, asked = _is_at_work(config, stage), time.monotonic()
            for line in opened:
                stream.write(line)
            stream.flush()
            if not at_work:
                return
            time.sleep(0.5)


def _log_file(config: RunConfig, stage: Stage, rank: int) -> Path:
    """Of the newest job."""
    if job := read_jobs(config.path).get(stage.id):
        file = rank_log(slurm.output_folder(config, stage, job), job, rank)
        files = [file] if file.is_file() else []
    else:
        files = sorted(log_folder(stage, config).glob(f"*_{rank}_log.out"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise UserError(f"{config.path} has no log of {stage.id} rank {rank}; it has not run yet, or has fewer ranks")
    return files[-1]


def _is_at_work(config: RunConfig, stage: Stage) -> bool:
    state = job_states(read_jobs(config.path)).get(stage.id)
    return state.is_active if state else _launcher(config.path) is not None


def _cancel(options, console: Console) -> None:
    ended = []
    for config in _below(options.run):
        ended += slurm.cancel(read_jobs(config.path))
        if (process := _launcher(config.path)) is not None:
            process.send_signal(signal.SIGINT)
            ended.append(f"process {process.pid}")
    console.print(f"ended: {', '.join(ended)}" if ended else "nothing is running", highlight=False)


def _launcher(run: Path) -> psutil.Process | None:
    """The process of this machine that runs the stages, where one does."""
    with contextlib.suppress(OSError, ValueError, psutil.NoSuchProcess):
        lock = (run / LOCK).resolve()
        host, pid = lock.read_text(encoding="utf-8").split()
        process = psutil.Process(int(pid))
        if host == platform.node() and str(lock) in {file.path for file in process.open_files()}:
            return process
    return None


def _runs(options, console: Console) -> None:
    found = [path for depth in ("*", "*/*") for path in options.folder.glob(f"{depth}/{CONFIG}")]  # sweeps' too
    found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    if not found:
        raise UserError(f"{options.folder} holds no runs; give the folder that run folders are in")
    rows, runs = {}, {}
    for path in found:
        name = str(path.parent.relative_to(options.folder))
        rows[name] = ["", ""]
        try:
            runs[name] = read_files(read_run(path.parent))
        except UserError as error:  # such as a config of another release
            rows[name] = ["", str(error)]
    for name, looks in zip(runs, look_at(list(runs.values()), console), strict=True):
        done = [look for look in looks if look.state.startswith("done")]
        rest = [look for look in looks if look not in done]
        rows[name] = [f"{len(done)}/{len(looks)}", f"{rest[0].stage.id}: {rest[0].state}" if rest else "done"]
    rows = [[name, count, textwrap.shorten(state, 100, placeholder=" ...")] for name, (count, state) in rows.items()]
    print_table(console, ("run", "stages", "state"), rows, 3)
