"""Looking at runs and ending them: status, logs, cancel, runs. All from files and from SLURM's answers, on any node."""

import argparse
import contextlib
import os
import shlex
import signal
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from sparse_train import artifacts
from sparse_train.config import RunConfig
from sparse_train.errors import UserError, told_of
from sparse_train.launch.run import slurm_queue
from sparse_train.launch.run.lock import Launcher, find_launcher, other_host
from sparse_train.launch.run.slurm_queue import JobState, job_states, read_jobs
from sparse_train.launch.run.stages import (
    CONFIG,
    Stage,
    build_stages,
    find_stage,
    is_dense_of_sweep,
    log_folder,
    read_progress,
    read_run,
    select,
)
from sparse_train.launch.submit.local import STOP_PATIENCE_S, plan, told_of_stop
from sparse_train.launch.worker.attempts import AttemptRecord, read_attempts
from sparse_train.launch.worker.endings import has_ending_since, newest_ending, rank_log, read_ending
from sparse_train.tables import make_table, print_table

_HEADER = ("stage", "state", "job", "nodes", "tries")
_WATCH_S, _STATE_WIDTH = 5.0, 300
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
        told = [_shortened(self.state)]
        if progress := self.progress:
            told.append(f"{progress['done']}/{progress['total']} {progress['note']}".strip())
            if progress["seconds_left"] is not None and self.state == "running":
                told.append(f"{progress['seconds_left'] / 60:.0f} min left")
        return [self.stage.id, ", ".join(told), self.job, self.nodes, str(self.tries or "")]


@dataclass(frozen=True)
class Files:
    """What a run's files say of its stages."""

    config: RunConfig
    planned: list[tuple[Stage, str]]
    jobs: dict[str, str]


def read_files(config: RunConfig) -> Files:
    """Raises UserError or OSError where the run cannot be read at all; a broken stage is told as its reason."""
    names = ["dense"] if is_dense_of_sweep(config) else []
    try:
        planned = plan(config, names)
    except (UserError, OSError):
        planned = [(stage, _reason(stage, config)) for stage in select(build_stages(config), names)]
    return Files(config, planned, read_jobs(config.path))


def _reason(stage: Stage, config: RunConfig) -> str:
    """plan's, of a stage by itself: another one is broken, or this."""
    try:
        return next(reason for other, reason in plan(config, [stage.id]) if other.id == stage.id)
    except (UserError, OSError) as error:
        return told_of(error)


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
    found: list[Look] = []
    for stage, reason in run.planned:
        failed = [look.stage.id for look in found if look.state.startswith(("failed", "cancelled", "held"))]
        try:
            found.append(_look_at_stage(run, stage, reason, states.get(stage.id), failed))
        except (UserError, OSError) as error:  # such as logs of another user's
            found.append(Look(stage, told_of(error)))
    return found


def _look_at_stage(run: Files, stage: Stage, reason: str, state: JobState | None, failed: list[str]) -> Look:
    tried = read_attempts(log_folder(stage, run.config))
    job = run.jobs.get(stage.id, "")
    if reason == "current":
        manifest = artifacts.read_manifest(run.config.path / stage.id)
        seconds = manifest.get("seconds")
        took = f" in {seconds:.0f} s" if isinstance(seconds, int | float) else ""
        return Look(stage, f"done{took}", job, _short(manifest.get("nodes") or ()), len(tried))
    text = _told(run.config, stage, reason, state, tried, failed)
    nodes = state.nodes if state and state.state == "RUNNING" else ""
    # What a finished stage wrote last tells nothing of why it will run again.
    old = text == reason and (run.config.path / stage.id / artifacts.DONE).is_file()
    return Look(stage, text, job, nodes, len(tried), None if old else read_progress(stage, run.config))


def _told(config: RunConfig, stage: Stage, reason: str, state: JobState | None,
          tried: list[AttemptRecord], failed: list[str]) -> str:
    behind = [name for name in stage.inputs if name in failed]
    # The dense model of a sweep is another run's.
    behind += ["/".join(Path(path).parts[-2:]) for path in stage.external.values()
               if Path(path).is_absolute() and not Path(path).is_dir()]
    if state is None or state.state == "UNKNOWN":  # the files alone tell
        newest = newest_ending(log_folder(stage, config), tried)
        if tried and newest is None and find_launcher(config.path) is not None:
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
    ending = newest_ending(log_folder(stage, config), tried)
    cause = f"rank {ending.rank} {ending.message}" if ending and ending.status != "finished" else state.reason
    return f"{'cancelled' if state.state == 'CANCELLED' else 'failed'}: {state.state} {cause}"


def _shortened(state: str) -> str:
    return textwrap.shorten(state, _STATE_WIDTH, placeholder=" ...")


def _short(nodes) -> str:
    return ",".join(map(str, nodes[:2])) + (f" and {len(nodes) - 2} more" if len(nodes) > 2 else "")


def _status(options, console: Console) -> None:
    folders = _run_folders(options.run)
    if not options.watch:
        files, broken = _read_each(folders)
        for run, looks in zip(files, look_at(files, console), strict=True):
            _print_run(run.config, looks, console, len(folders) > 1)
        for name, why in broken.items():
            console.print(f"{name}: {why}", style="yellow", highlight=False, markup=False, soft_wrap=True)
        return
    with Live(console=console, auto_refresh=False) as live, contextlib.suppress(KeyboardInterrupt):
        while True:
            files, broken = _read_each(folders)
            rows = [look.cells() for looks in look_at(files, console) for look in looks]
            rows += [[name, why, *[""] * (len(_HEADER) - 2)] for name, why in broken.items()]
            live.update(make_table(console, _HEADER, rows, len(_HEADER)), refresh=True)
            time.sleep(_WATCH_S)


def _read_each(folders: Sequence[Path]) -> tuple[list[Files], dict[str, str]]:
    """(runs, why each of the others cannot be read). Raises what is wrong with a single one."""
    files, broken = [], {}
    for folder in folders:
        try:
            files.append(read_files(read_run(folder)))
        except (UserError, OSError) as error:
            if len(folders) == 1:
                raise
            broken[folder.name] = told_of(error)
    return files, broken


def _print_run(config: RunConfig, looks: list[Look], console: Console, named: bool) -> None:
    if named:
        console.print(f"[bold]{config.name}", highlight=False)
    print_table(console, _HEADER, [look.cells() for look in looks], len(_HEADER))
    for look in looks:
        if look.state.startswith("failed"):
            for line in (f"{look.stage.id} {look.state}",
                         f"    sparse-train logs {shlex.quote(str(config.path))} {look.stage.id}"):
                console.print(line, highlight=False, markup=False, soft_wrap=True)


def _run_folders(folder: Path) -> list[Path]:
    """The run in `folder`, or those of a sweep."""
    if (folder / CONFIG).is_file():
        return [folder]
    return sorted(_find_runs(folder, 1)) or [folder]


def _logs(options, console: Console) -> None:
    config = read_run(options.run)
    stage = find_stage(config, options.stage)
    file = _log_file(config, stage, options.rank)
    stream, asked = sys.stdout, -_ASK_S
    # A result that --replace is to replace stands until the new one does.
    earlier, at_work = _signed_at(config, stage), options.follow and _reason(stage, config) != "current"
    with open(file, errors="replace", encoding="utf-8") as opened:
        while True:
            # Asked before reading: what is written until the end is still read.
            if at_work and _signed_at(config, stage) not in (None, earlier):
                at_work = False
            elif at_work and time.monotonic() - asked > _ASK_S:
                at_work, asked = _is_at_work(config, stage), time.monotonic()
            for line in opened:
                stream.write(line)
            stream.flush()
            if not at_work:
                return
            time.sleep(0.5)


def _signed_at(config: RunConfig, stage: Stage) -> int | None:
    """In nanoseconds since the epoch; None where there is no result."""
    with contextlib.suppress(OSError):
        return (config.path / stage.id / artifacts.DONE).stat().st_mtime_ns
    return None


def _log_file(config: RunConfig, stage: Stage, rank: int) -> Path:
    """Of the newest job."""
    if job := read_jobs(config.path).get(stage.id):
        file = rank_log(slurm_queue.output_folder(config, stage, job), job, rank)
        files = [file] if file.is_file() else []
    else:
        files = sorted(log_folder(stage, config).glob(f"*_{rank}_log.out"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise UserError(f"{config.path} has no log of {stage.id} rank {rank}; it has not run yet, or has fewer ranks")
    return files[-1]


def _is_at_work(config: RunConfig, stage: Stage) -> bool:
    state = job_states(read_jobs(config.path)).get(stage.id)
    return state.is_active if state else find_launcher(config.path) is not None


def _cancel(options, console: Console) -> int:
    folders = _run_folders(options.run)
    # A sweep's launcher is that of its folder and of the run that it is at.
    launchers = {launcher: folder for folder in (options.run, *folders) if (launcher := find_launcher(folder))}
    ended = [_end_launcher(folder, launcher, console) for launcher, folder in launchers.items()]
    withdrawn = [stage for folder in folders for stage in slurm_queue.cancel(read_jobs(folder))]
    if withdrawn:
        console.print(f"withdrawn: {', '.join(withdrawn)}", highlight=False)
    elif not launchers:
        if folders == [options.run]:
            read_run(options.run)  # raises where it is no run
        if host := next(filter(None, map(other_host, (options.run, *folders))), ""):
            raise UserError(f"{options.run} was started on {host} and has not ended, unless it was killed; run this "
                            "command there")
        console.print("nothing is running", highlight=False)
    return 0 if all(ended) else 1


def _end_launcher(folder: Path, launcher: Launcher, console: Console) -> bool:
    """Ask the process that runs the stages of `folder` to end, wait for it, and tell what it came to."""
    since, pid = time.time(), launcher.pid
    try:
        os.kill(pid, signal.SIGTERM)  # not SIGINT, which a process in a shell's background ignores
    except PermissionError as error:
        raise UserError(f"process {pid} runs {folder} and is another user's; ask its owner to end it") from error
    console.print(f"waiting for process {pid} to save its state and end", highlight=False)
    while launcher.is_alive:
        waited = time.time() - since
        if waited > STOP_PATIENCE_S + 10:
            console.print(f"process {pid} is still running after {waited:.0f} s; kill -9 {pid} ends it, without a save",
                          highlight=False)
            return False
        time.sleep(0.2)
    console.print(_told_of_end(folder, since), highlight=False, markup=False, soft_wrap=True)
    return True


def _told_of_end(folder: Path, since: float) -> str:
    """What the stage that ended after `since` came to, by its endings."""
    with contextlib.suppress(UserError):  # a sweep's folder is no run
        config = read_run(folder)
        for stage in build_stages(config):
            logs = log_folder(stage, config)
            tried = read_attempts(logs)
            if tried and has_ending_since(logs, tried[-1].attempt, since):
                ending = read_ending(logs, tried[-1].attempt, tried[-1].ranks)
                return f"ended: {told_of_stop(stage, ending)}"
    return "ended; the same command goes on from what is finished"


def _runs(options, console: Console) -> None:
    found = _find_runs(options.folder, 2)  # a sweep's are below its folder
    if not found:
        raise UserError(f"{options.folder} holds no runs; give the folder that run folders are in")
    found = dict(sorted(found.items(), key=lambda item: item[1][0], reverse=True))
    rows, runs = {}, {}
    for path, (_, why) in found.items():
        rows[path] = ["", why]
        try:
            if not why:
                runs[path] = read_files(read_run(path))
        except (UserError, OSError) as error:  # such as a config of another release
            rows[path] = ["", told_of(error)]
    for path, looks in zip(runs, look_at(list(runs.values()), console), strict=True):
        done = [look for look in looks if look.state.startswith("done")]
        rest = [look for look in looks if look not in done]
        rows[path] = [f"{len(done)}/{len(looks)}", f"{rest[0].stage.id}: {rest[0].state}" if rest else "done"]
    print_table(console, ("run", "stages", "state"), [
        [str(path.relative_to(options.folder)), count, _shortened(state)]
        for path, (count, state) in rows.items()], 3)


def _find_runs(folder: Path, depth: int) -> dict[Path, tuple[float, str]]:
    """Run folders below `folder` and the times of their configs; and folders that cannot be read, with the reason."""
    found: dict[Path, tuple[float, str]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        try:
            if (path / CONFIG).is_file():
                found[path] = (path / CONFIG).stat().st_mtime, ""
            elif depth > 1 and path.is_dir():
                found |= _find_runs(path, depth - 1)
        except OSError as error:
            found[path] = 0.0, told_of(error)
    return found
