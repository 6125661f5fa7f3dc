"""This process: its rank, the number of ranks, its node, and the attempt at the stage that it belongs to.

On SLURM all of this comes from SLURM's variables, on this machine from those that submitit sets; neither ssh nor a host
file is needed.
"""

import os
import subprocess
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from submitit import JobEnvironment

_FIRST_PORT, _NUM_PORTS = 20_000, 12_000  # below the ports of outgoing connections (32768 ...)


@dataclass(frozen=True)
class Attempt:
    """One attempt at a stage: a job, and how often SLURM has started it again under the same number."""

    job: str
    restarts: int

    def __str__(self) -> str:
        """JOB.RESTARTS, as in files and paths."""
        return f"{self.job}.{self.restarts}"

    @classmethod
    def parse(cls, text: str) -> "Attempt":
        """Raises ValueError where `text` is not JOB.RESTARTS."""
        job, _, restarts = text.rpartition(".")
        return cls(job, int(restarts))


@dataclass(frozen=True)
class ProcessInfo:
    rank: int
    num_ranks: int
    local_rank: int
    ranks_on_node: int
    host: str
    nodes: tuple[str, ...]
    attempt: Attempt

    @property
    def port(self) -> int:
        """The rendezvous on the first node. Attempts have different ports, as the last one may still hold its own."""
        number = int(os.environ.get("SLURM_JOB_ID") or self.attempt.job) + 1_009 * self.attempt.restarts
        return _FIRST_PORT + number % _NUM_PORTS


def current_process() -> ProcessInfo:
    environment = _environment()
    return ProcessInfo(environment.global_rank, environment.num_tasks, environment.local_rank,
                       environment.num_tasks // environment.num_nodes, environment.hostname,
                       tuple(environment.hostnames), current_attempt())


def current_attempt() -> Attempt:
    # A local run may be started inside a SLURM job, whose restarts are not those of the run.
    restarts = os.environ.get("SLURM_RESTART_COUNT") if os.environ.get("SUBMITIT_EXECUTOR") == "slurm" else None
    return Attempt(_environment().job_id, int(restarts or 0))


def deadline() -> float | None:
    """When SLURM will end this job, in seconds since the epoch; None elsewhere, and where SLURM does not know."""
    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm":
        return None
    try:
        if end_time := os.environ.get("SLURM_JOB_END_TIME"):  # since SLURM 23.02
            return float(end_time)
        squeue = subprocess.run(["squeue", "-h", "-j", _environment().job_id, "-o", "%e"], capture_output=True,
                                encoding="utf-8", errors="replace", timeout=30, check=True)
        return datetime.fromisoformat(squeue.stdout.strip()).timestamp()
    except (OSError, subprocess.SubprocessError, ValueError):  # also "NONE", of a job without a limit
        return None


def _environment() -> "JobEnvironment":
    from submitit import JobEnvironment  # slow to import, and `status` imports this module

    return JobEnvironment()
