"""Where this process stands: its rank among how many, on which node, in which attempt at its stage.

On SLURM all of it comes from SLURM's own variables, on this machine from those that submitit sets; nothing asks for ssh
or a host file.
"""

import os
import subprocess
from dataclasses import dataclass
from datetime import datetime

_FIRST_PORT, _NUM_PORTS = 20_000, 12_000  # below the range that systems hand out for outgoing connections (32768 ...)


@dataclass(frozen=True)
class Place:
    rank: int
    num_ranks: int
    local_rank: int
    ranks_on_node: int
    host: str
    nodes: tuple[str, ...]
    attempt: str
    """JOB.RESTARTS: a job that SLURM runs again is another attempt under the same number."""

    @property
    def job(self) -> str:
        return self.attempt.rpartition(".")[0]

    @property
    def port(self) -> int:
        """Of the rendezvous on the first node; another one after a requeue, since the last attempt may still hold its
        own."""
        job, _, restarts = self.attempt.rpartition(".")
        number = int(os.environ.get("SLURM_JOB_ID") or job) + 1_009 * int(restarts)
        return _FIRST_PORT + number % _NUM_PORTS


def attempt_of_job() -> str:
    # Processes of this machine may be inside somebody's job.
    restarts = os.environ.get("SLURM_RESTART_COUNT") if os.environ.get("SUBMITIT_EXECUTOR") == "slurm" else None
    return f"{_environment().job_id}.{restarts or 0}"


def _environment():
    from submitit import JobEnvironment  # brings much that status can do without

    return JobEnvironment()


def find_place() -> Place:
    environment = _environment()
    return Place(environment.global_rank, environment.num_tasks, environment.local_rank,
                 environment.num_tasks // environment.num_nodes, environment.hostname, tuple(environment.hostnames),
                 attempt_of_job())


def deadline() -> float | None:
    """When SLURM will end this job, in seconds since the epoch; None elsewhere, and where SLURM does not tell."""
    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm":
        return None
    try:
        if told := os.environ.get("SLURM_JOB_END_TIME"):  # since SLURM 23.02
            return float(told)
        job = _environment().job_id
        asked = subprocess.run(["squeue", "-h", "-j", job, "-o", "%e"], capture_output=True, encoding="utf-8",
                               errors="replace", timeout=30, check=True)
        return datetime.fromisoformat(asked.stdout.strip()).timestamp()
    except (OSError, subprocess.SubprocessError, ValueError):  # also "NONE", of a job without a limit
        return None
