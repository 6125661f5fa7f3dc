"""sparse-train cancel: end a run's jobs, or the launcher that runs its stages on this machine."""

import argparse
import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from sparse_train.errors import UserError
from sparse_train.launch.monitor.folders import run_folders
from sparse_train.launch.run import slurm_queue
from sparse_train.launch.run.folder import log_folder, read_run
from sparse_train.launch.run.lock import Launcher, find_launcher, other_host
from sparse_train.launch.run.slurm_queue import read_jobs
from sparse_train.launch.run.stages import build_stages
from sparse_train.launch.worker.attempts import read_attempts
from sparse_train.launch.worker.endings import STOP_PATIENCE_S, describe_stop, has_ending_since, read_ending


def add_cancel(commands: "argparse._SubParsersAction[Any]") -> None:
    cancel = commands.add_parser("cancel", help="end a run's jobs; the same run command continues from their state")
    cancel.add_argument("run", type=Path, metavar="RUN")
    cancel.set_defaults(command=_cancel)


def _cancel(options: argparse.Namespace, console: Console) -> int:
    folders = run_folders(options.run)
    # The launcher of a sweep holds the locks of the sweep's folder and of the current run.
    launchers = {launcher: folder for folder in (options.run, *folders) if (launcher := find_launcher(folder))}
    ended = [_end_launcher(folder, launcher, console) for launcher, folder in launchers.items()]
    withdrawn = [stage for folder in folders for stage in slurm_queue.cancel(read_jobs(folder))]
    if withdrawn:
        console.print(f"withdrawn: {', '.join(withdrawn)}", highlight=False)
    elif not launchers:
        _require_not_elsewhere(options.run, folders)
        console.print("nothing is running", highlight=False)
    return 0 if all(ended) else 1


def _require_not_elsewhere(run: Path, folders: list[Path]) -> None:
    """Raises UserError where the launcher is on another machine, or `run` is not a run."""
    if folders == [run]:
        read_run(run)
    for host in filter(None, map(other_host, (run, *folders))):
        raise UserError(f"{run} was started on {host} and has not ended, unless it was killed; run this command there")


def _end_launcher(folder: Path, launcher: Launcher, console: Console) -> bool:
    """End the process that runs the stages of `folder`, wait for it, and print how its stage ended. False where it does
    not end."""
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
    console.print(_describe_end(folder, since), highlight=False, markup=False, soft_wrap=True)
    return True


def _describe_end(folder: Path, since: float) -> str:
    """How the stage ended whose endings were written after `since`."""
    with contextlib.suppress(UserError):  # the folder of a sweep is not a run folder
        config = read_run(folder)
        for stage in build_stages(config):
            logs = log_folder(stage, config)
            records = read_attempts(logs)
            if records and has_ending_since(logs, records[-1].attempt, since):
                ending = read_ending(logs, records[-1].attempt, records[-1].ranks)
                return f"ended: {describe_stop(stage, ending)}"
    return "ended; the same command continues after the finished stages"
