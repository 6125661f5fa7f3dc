"""sparse-train logs: print the output of a rank of a stage, and follow it."""

import argparse
import contextlib
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from sparse_train import artifacts
from sparse_train.config import RunConfig
from sparse_train.errors import UserError
from sparse_train.jobs.stage import Stage
from sparse_train.launch.monitor.state import plan_alone
from sparse_train.launch.run.folder import log_folder, read_run
from sparse_train.launch.run.lock import find_launcher
from sparse_train.launch.run.slurm_queue import job_states, output_folder, read_jobs
from sparse_train.launch.run.stages import find_stage
from sparse_train.launch.worker.endings import rank_log

_POLL_S, _QUEUE_POLL_S = 0.5, 10.0  # between reads of the file, and queries of SLURM


def add_logs(commands: "argparse._SubParsersAction[Any]") -> None:
    logs = commands.add_parser("logs", help="the output of a stage")
    logs.add_argument("run", type=Path, metavar="RUN")
    logs.add_argument("stage", metavar="STAGE", help="such as finetune/squarehead")
    logs.add_argument("--rank", type=int, default=0, metavar="R")
    logs.add_argument("-f", "--follow", action="store_true", help="keep printing until the stage ends")
    logs.set_defaults(command=_logs)


def _logs(options: argparse.Namespace, console: Console) -> None:
    config = read_run(options.run)
    stage = find_stage(config, options.stage)
    file = _log_file(config, stage, options.rank)
    following = _Following(config, stage) if options.follow else None
    with open(file, errors="replace", encoding="utf-8") as lines:
        while True:
            # Before reading, so that the last lines are read as well.
            running = following is not None and following.is_running()
            for line in lines:
                sys.stdout.write(line)
            sys.stdout.flush()
            if not running:
                return
            time.sleep(_POLL_S)


class _Following:
    """Whether a stage still runs; SLURM is not queried each time."""

    def __init__(self, config: RunConfig, stage: Stage):
        self._config, self._stage = config, stage
        # With --replace the old result stays until the new one is complete.
        self._earlier = _signed_at(config, stage)
        self._running = not plan_alone(stage, config).is_current
        self._next_query = time.monotonic()

    def is_running(self) -> bool:
        if self._running and _signed_at(self._config, self._stage) not in (None, self._earlier):
            self._running = False
        elif self._running and time.monotonic() >= self._next_query:
            self._running = _is_running(self._config, self._stage)
            self._next_query = time.monotonic() + _QUEUE_POLL_S
        return self._running


def _signed_at(config: RunConfig, stage: Stage) -> int | None:
    """When the result was signed, in nanoseconds since the epoch; None where there is none."""
    with contextlib.suppress(OSError):
        return (config.path / stage.id / artifacts.DONE).stat().st_mtime_ns
    return None


def _log_file(config: RunConfig, stage: Stage, rank: int) -> Path:
    """The output of a rank in the newest job. Raises UserError where there is none."""
    if job := read_jobs(config.path).get(stage.id):
        file = rank_log(output_folder(config, stage, job), job, rank)
        files = [file] if file.is_file() else []
    else:
        files = sorted(log_folder(stage, config).glob(f"*_{rank}_log.out"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise UserError(f"{config.path} has no log of {stage.id} rank {rank}; it has not run yet, or has fewer ranks")
    return files[-1]


def _is_running(config: RunConfig, stage: Stage) -> bool:
    state = job_states(read_jobs(config.path)).get(stage.id)
    return state.is_active if state else find_launcher(config.path) is not None
