"""The work of each process of a stage: join the ranks, do the job, publish its folder on rank 0, write how it ended.

    python -m sparse_train.launch.worker.process RUN STAGE     under srun; without it submitit calls work()
"""

import contextlib
import importlib
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_train import dist, log
from sparse_train.config import RunConfig
from sparse_train.config.load import load_config
from sparse_train.cpus import set_threads
from sparse_train.errors import UserError
from sparse_train.jobs.job import Job, Stopped
from sparse_train.jobs.ledger import num_finished
from sparse_train.jobs.stage import Stage
from sparse_train.launch.run.cluster import CLUSTER, ClusterConfig
from sparse_train.launch.run.folder import log_folder, partial_folder, progress_file, read_inputs, read_run
from sparse_train.launch.run.sources import is_current
from sparse_train.launch.run.stages import find_stage
from sparse_train.launch.worker import attempts
from sparse_train.launch.worker.endings import EXIT_CODES, reserve_ending, write_ending
from sparse_train.launch.worker.failures import run_to_ending
from sparse_train.launch.worker.process_info import ProcessInfo, current_process, deadline
from sparse_train.launch.worker.rank_checks import check_ranks
from sparse_train.launch.worker.ranks import join_ranks
from sparse_train.launch.worker.staging import check_inputs, prepare_folder, publish
from sparse_train.tracking import Progress, log_results
from sparse_train.training import checkpoint

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2)  # the latter is SLURM's warning before the time limit
_PUBLISHED = "published"


def work(run_folder: str, stage_id: str, port: int | None = None) -> None:
    """Run one stage of the run in `run_folder`; each rank calls this. Exits with the ending's code unless it is 0.

    `port`: of the rendezvous; None takes that of the attempt.
    """
    info = current_process()
    log.set_up_rank(info.rank)
    config = read_run(Path(run_folder))
    cluster = load_config(ClusterConfig, config.path / CLUSTER)
    process = StageProcess(info, config, cluster, find_stage(config, stage_id), port or info.port)
    for number in _STOP_SIGNALS:
        # submitit's handlers would save on one rank only. A job on ranks installs its own later. Until then they may
        # wait for each other in native code, where no Python handler runs.
        signal.signal(number, signal.SIG_DFL if process.stage.is_distributed else _raise_stopped)

    ending = run_to_ending(process.run, info.rank, config.path)
    if ending is not None:
        with contextlib.suppress(OSError):  # a full disk; the exit code still says how it ended
            write_ending(process.logs, info.attempt, ending)
    status = ending.status if ending else "broken"
    if status != "finished":
        _exit(EXIT_CODES[status])


def _raise_stopped(number: int, frame: object) -> None:
    raise Stopped(number)


def _exit(code: int) -> None:
    """Like sys.exit, but without closing the process group, which may wait for a rank that has ended."""
    for stream in (sys.stderr, sys.stdout):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


@dataclass(frozen=True)
class StageProcess:
    """A stage, as one of its processes runs it."""

    info: ProcessInfo
    config: RunConfig
    cluster: ClusterConfig
    stage: Stage
    port: int
    """Of the rendezvous on the first node."""

    @property
    def logs(self) -> Path:
        return log_folder(self.stage, self.config)

    def run(self) -> None:
        """Do the stage's job and publish its folder. Collective where the stage is distributed."""
        reserve_ending(self.logs, self.info.attempt, self.info.rank)
        if is_current(self.stage, self.config):  # a task of an array that runs for another, or a job requeued too late
            return
        if self.info.rank == 0:  # now, so that an attempt that still runs elsewhere writes no more
            partial = partial_folder(self.stage, self.config)
            attempts.begin(self.logs, self.info,
                           checkpoint.newest_step(partial / "checkpoints") or num_finished(partial))
        if self.stage.is_distributed:
            self._run_on_ranks()
        else:
            self._run_alone()

    def _run_on_ranks(self) -> None:
        started = time.time()
        heartbeat = join_ranks(self.info, self.cluster, self.port, self.logs, not self.stage.is_training)
        if self.cluster.preflight:
            check_ranks(self.info, self.config, self.stage)
        try:
            metrics = self._run_job(deadline() if self.info.rank == 0 else None)
        except Exception as error:
            if heartbeat.stall:
                error.add_note(heartbeat.stall)
            raise
        if self.info.rank == 0:
            self._publish(metrics, started)
            heartbeat.announce(_PUBLISHED)
        else:  # to read a large model back and sign it, rank 0 may take longer than a collective may wait
            heartbeat.wait_for(_PUBLISHED)
        dist.barrier()
        heartbeat.stop()
        dist.stop()

    def _run_alone(self) -> None:
        started, time_limit = time.time(), deadline()
        set_threads()
        try:
            metrics = self._run_job(time_limit)
        except Stopped as stop:
            # SLURM's warning may come a minute early. A preempted job is requeued with its full time limit.
            if stop.args == (signal.SIGUSR2,) and time_limit and time.time() > time_limit - self.cluster.warning_s - 60:
                raise UserError(f"stage {self.stage.id} met its time limit and keeps no state to continue from; give "
                                f"it more: cluster.stages.{self.stage.kind}.time=...") from None
            raise
        self._publish(metrics, started)

    def _run_job(self, deadline_s: float | None) -> dict[str, Any]:
        """`deadline_s`: when the process will be ended, in seconds since the epoch."""
        stage, config = self.stage, self.config
        dist.agree(lambda: check_inputs(stage, config))
        if self.info.rank == 0:
            prepare_folder(stage, config)
        dist.barrier()
        progress = Progress(progress_file(stage, config), self._require_newest_attempt)
        job = Job(config, stage, partial_folder(stage, config), read_inputs(stage, config), progress, deadline_s,
                  self._require_newest_attempt)
        return importlib.import_module(f"sparse_train.jobs.{stage.kind}").run(job)

    def _publish(self, metrics: dict[str, Any], started: float) -> None:
        self._require_newest_attempt()
        for number in _STOP_SIGNALS:  # nothing but the signing is left
            signal.signal(number, signal.SIG_IGN)
        publish(self.stage, self.config, metrics, time.time() - started, self.info)
        if (wandb := self.config.tracking.wandb) and not self.stage.is_training:  # which has logged its steps
            log_results(self.config.path, self.stage.id, self.stage.kind, metrics, wandb)

    def _require_newest_attempt(self) -> None:
        attempts.require_newest(self.logs, self.info.attempt)


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2])
