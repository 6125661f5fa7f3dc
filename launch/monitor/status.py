"""sparse-train status and runs: the stages of a run, and all runs of a folder. They work on any node."""

import argparse
import contextlib
import shlex
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from sparse_train.config import RunConfig
from sparse_train.errors import UserError, describe_error
from sparse_train.launch.monitor.folders import find_runs, run_folders
from sparse_train.launch.monitor.state import RunFiles, StageStatus, State, read_files, read_status
from sparse_train.launch.run.folder import read_run
from sparse_train.tables import make_table, print_table

_HEADER = ("stage", "state", "job", "nodes", "tries")
_WATCH_S, _STATE_WIDTH = 5.0, 300


def add_status(commands: "argparse._SubParsersAction[Any]") -> None:
    status = commands.add_parser("status", help="the stages of a run: state, node, progress")
    status.add_argument("run", type=Path, metavar="RUN", help="such as runs/demo")
    status.add_argument("--watch", action="store_true", help="until Ctrl-C")
    status.set_defaults(command=_status)

    runs = commands.add_parser("runs", help="all runs of a folder")
    runs.add_argument("folder", type=Path, nargs="?", default=Path("runs"), metavar="FOLDER")
    runs.set_defaults(command=_runs)


def _status(options: argparse.Namespace, console: Console) -> None:
    folders = run_folders(options.run)
    if options.watch:
        _watch(folders, console)
        return
    runs, problems = _read_runs(folders)
    for run, statuses in zip(runs, read_status(runs, console), strict=True):
        _print_run(run.config, statuses, console, with_name=len(folders) > 1)
    for name, problem in problems.items():
        console.print(f"{name}: {problem}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def _watch(folders: Sequence[Path], console: Console) -> None:
    with Live(console=console, auto_refresh=False) as live, contextlib.suppress(KeyboardInterrupt):
        while True:
            runs, problems = _read_runs(folders)
            rows = [_cells(status) for statuses in read_status(runs, console) for status in statuses]
            rows += [[name, problem, *[""] * (len(_HEADER) - 2)] for name, problem in problems.items()]
            live.update(make_table(console, _HEADER, rows, len(_HEADER)), refresh=True)
            time.sleep(_WATCH_S)


def _read_runs(folders: Sequence[Path]) -> tuple[list[RunFiles], dict[str, str]]:
    """(runs, why each of the others cannot be read). Raises the error of a single one."""
    runs, problems = [], {}
    for folder in folders:
        try:
            runs.append(read_files(read_run(folder)))
        except (UserError, OSError) as error:
            if len(folders) == 1:
                raise
            problems[folder.name] = describe_error(error)
    return runs, problems


def _print_run(config: RunConfig, statuses: Sequence[StageStatus], console: Console, with_name: bool) -> None:
    if with_name:
        console.print(f"[bold]{config.name}", highlight=False)
    print_table(console, _HEADER, [_cells(status) for status in statuses], len(_HEADER))
    for status in statuses:
        if status.state is State.FAILED:
            for line in (f"{status.stage.id} {status.text}",
                         f"    sparse-train logs {shlex.quote(str(config.path))} {status.stage.id}"):
                console.print(line, highlight=False, markup=False, soft_wrap=True)


def _cells(status: StageStatus) -> list[str]:
    parts = [_shorten(status.text)]
    if progress := status.progress:
        parts.append(f"{progress['done']}/{progress['total']} {progress['note']}".strip())
        if progress["seconds_left"] is not None and status.state is State.RUNNING:
            parts.append(f"{progress['seconds_left'] / 60:.0f} min left")
    return [status.stage.id, ", ".join(parts), status.job, status.nodes, str(status.num_attempts or "")]


def _shorten(text: str) -> str:
    return textwrap.shorten(text, _STATE_WIDTH, placeholder=" ...")


def _runs(options: argparse.Namespace, console: Console) -> None:
    folders = find_runs(options.folder, 2)  # a sweep's runs are below its folder
    if not folders:
        raise UserError(f"{options.folder} holds no runs; give the folder that run folders are in")
    newest_first = sorted(folders, key=lambda path: folders[path].started, reverse=True)
    rows: dict[Path, tuple[str, str]] = {}
    runs: dict[Path, RunFiles] = {}
    for path in newest_first:
        rows[path] = "", folders[path].problem
        try:
            if not folders[path].problem:
                runs[path] = read_files(read_run(path))
        except (UserError, OSError) as error:  # such as a config of another release
            rows[path] = "", describe_error(error)
    for path, statuses in zip(runs, read_status(list(runs.values()), console), strict=True):
        rows[path] = _summarise(statuses)
    print_table(console, ("run", "stages", "state"), [
        [str(path.relative_to(options.folder)), count, _shorten(text)] for path, (count, text) in rows.items()], 3)


def _summarise(statuses: Sequence[StageStatus]) -> tuple[str, str]:
    """(how many stages are done, the first that is not)."""
    rest = [status for status in statuses if status.state is not State.DONE]
    count = f"{len(statuses) - len(rest)}/{len(statuses)}"
    return count, f"{rest[0].stage.id}: {rest[0].text}" if rest else "done"
