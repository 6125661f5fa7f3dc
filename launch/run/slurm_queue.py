"""The jobs of a run in SLURM: their ids, their states, and how to withdraw them."""

import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sparse_train.config import RunConfig
from sparse_train.errors import UserError
from sparse_train.jobs.stage import Stage
from sparse_train.launch.run.folder import CONFIG, JOB_FILE, log_folder

Key = TypeVar("Key")
_ACTIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "RESIZING",
           "SIGNALING", "STAGE_OUT", "STOPPED", "SPECIAL_EXIT")


@dataclass(frozen=True)
class JobState:
    state: str
    """In SLURM's words, such as RUNNING."""
    reason: str = ""
    """Why it waits."""
    nodes: str = ""

    @property
    def is_active(self) -> bool:
        return self.state in _ACTIVE


def require_idle(folder: Path) -> None:
    """Raises UserError where jobs of the run in `folder`, or of any run of the sweep there, are in the queue."""
    jobs = read_jobs(folder)
    for config in folder.glob(f"*/{CONFIG}"):
        jobs |= {f"{config.parent.name}/{stage}": job for stage, job in read_jobs(config.parent).items()}
    active = [name for name, state in job_states(jobs).items() if state.is_active]
    if active:
        raise UserError(f"{folder} has jobs in the queue ({', '.join(active)}); wait for them, or withdraw them: "
                        f"sparse-train cancel {shlex.quote(str(folder))}")


def read_jobs(run: Path) -> dict[str, str]:
    """stage -> the newest job submitted for it (RUN/logs/STAGE/job); empty for a run that was never on SLURM."""
    logs = run / "logs"
    jobs = {str(file.parent.relative_to(logs)): file.read_text(encoding="utf-8", errors="replace").strip()
            for file in sorted(logs.rglob(JOB_FILE))}
    for stage, job in jobs.items():
        if not re.fullmatch(r"\d+(_\d+)?", job):
            raise UserError(f"{logs / stage / JOB_FILE} holds {job[:40]!r}, which is not the number of a job; "
                            "delete it")
    return jobs


def output_folder(config: RunConfig, stage: Stage, job: str) -> Path:
    """The folder of the output of `job`; the tasks of an array write to that of the sweep."""
    return config.path.parent / "logs" / stage.id if "_" in job else log_folder(stage, config)


def job_states(jobs: Mapping[Key, str]) -> dict[Key, JobState]:
    """The state of each job, from squeue for those in the queue and from sacct for the others.

    sacct alone is not enough: between a node's failure and the requeue it reports NODE_FAIL for a job that will run
    again. Raises UserError where SLURM does not answer.
    """
    ids = list(dict.fromkeys(jobs.values()))
    if not ids:
        return {}
    states = _queued(ids)
    if rest := [job for job in ids if job not in states]:
        states |= _accounted(rest)
    return {key: states.get(job, JobState("UNKNOWN")) for key, job in jobs.items()}


def _queued(ids: list[str]) -> dict[str, JobState]:
    lines = _run_slurm(["squeue", "-h", "-r", "-j", ",".join(ids), "-o", "%i|%T|%r|%N"])
    return {job: JobState(state, "" if reason == "None" else reason, nodes)
            for job, state, reason, nodes in (line.split("|") for line in lines)}


def _accounted(ids: list[str]) -> dict[str, JobState]:
    # Ask for whole arrays: tasks that never started share one line, such as 9_[0-3].
    lines = _run_slurm(["env", "SLURM_BITSTR_LEN=0", "sacct", "-n", "-P", "-X", "-j",
                        ",".join(dict.fromkeys(map(array_of, ids))), "-o", "JobID,State,ExitCode,NodeList"])
    states: dict[str, JobState] = {}
    for text, state, code, nodes in (line.split("|") for line in lines):
        for job in set(_expand_job_ids(text)) & set(ids):
            states[job] = JobState(state.split()[0], f"exit code {code}", nodes)  # "CANCELLED by 0"
    return states


def _expand_job_ids(text: str) -> Iterator[str]:
    """9_[0-1,3%2] -> 9_0, 9_1, 9_3."""
    from submitit.slurm.slurm import read_job_id  # slow to import, and rarely needed here

    for number, *tasks in read_job_id(text):
        if tasks:
            yield from (f"{number}_{task}" for task in range(int(tasks[0]), int(tasks[-1]) + 1))
        else:
            yield number


def cancel(jobs: Mapping[str, str]) -> list[str]:
    """Withdraw the active jobs; returns their stages."""
    active = [stage for stage, state in job_states(jobs).items() if state.is_active]
    if active:
        _run_slurm(["scancel", *(jobs[stage] for stage in active)])
    return active


def _run_slurm(command: list[str]) -> list[str]:
    """The lines that the command prints. squeue fails where all jobs have left the queue, and sacct where there is no
    accounting; both count as no lines."""
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{command[0]} does not answer ({error}); ask from a login node of the cluster") from error
    if done.returncode and command[0] in ("squeue", "scancel") and "Invalid job id" not in done.stderr:
        raise UserError(f"{command[0]} failed: {' '.join(done.stderr.split())}; try again")
    return done.stdout.splitlines()


def array_of(job: str) -> str:
    """9_3 -> 9."""
    return job.partition("_")[0]
