"""Jobs that were submitted: which they are, what SLURM says of them, and how to withdraw them."""

import re
import shlex
import subprocess
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sparse_train.config import RunConfig
from sparse_train.errors import UserError
from sparse_train.jobs.stage import Stage
from sparse_train.launch.run.stages import CONFIG, JOB_FILE, log_folder

ACTIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD", "RESIZING",
          "SIGNALING", "STAGE_OUT", "STOPPED", "SPECIAL_EXIT")


@dataclass(frozen=True)
class JobState:
    state: str
    """As SLURM calls it, such as RUNNING."""
    reason: str = ""
    """Why it waits."""
    nodes: str = ""

    @property
    def is_active(self) -> bool:
        return self.state in ACTIVE


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
    found = {str(note.parent.relative_to(logs)): note.read_text(encoding="utf-8", errors="replace").strip()
             for note in sorted(logs.rglob(JOB_FILE))}
    for stage, job in found.items():
        if not re.fullmatch(r"\d+(_\d+)?", job):
            raise UserError(f"{logs / stage / JOB_FILE} holds {job[:40]!r}, which is no number of a job; delete it")
    return found


def output_folder(config: RunConfig, stage: Stage, job: str) -> Path:
    """Where what `job` prints is; the tasks of an array print into the sweep's folder."""
    return config.path.parent / "logs" / stage.id if "_" in job else log_folder(stage, config)


def job_states(jobs: dict[Hashable, str]) -> dict[Hashable, JobState]:
    """Stages to their jobs -> what SLURM says of them: squeue of those in the queue, sacct of the others.

    sacct alone would not do: between a node's failure and the requeue it says NODE_FAIL of a job that will run again.
    """
    ids = list(dict.fromkeys(jobs.values()))
    if not ids:
        return {}
    found: dict[str, JobState] = {}
    asked = _ask(["squeue", "-h", "-r", "-j", ",".join(ids), "-o", "%i|%T|%r|%N"])
    for job, state, reason, nodes in (line.split("|") for line in asked):
        found[job] = JobState(state, "" if reason == "None" else reason, nodes)
    rest = [job for job in ids if job not in found]
    if rest:
        # By whole arrays: a task that never started has no line of its own, but one as 9_[0-3] with its peers.
        asked = _ask(["env", "SLURM_BITSTR_LEN=0", "sacct", "-n", "-P", "-X", "-j",
                      ",".join(dict.fromkeys(map(array_of, rest))), "-o", "JobID,State,ExitCode,NodeList"])
        for some, state, code, nodes in (line.split("|") for line in asked):
            for job in set(_tasks_of(some)) & set(rest):
                found[job] = JobState(state.split()[0], f"exit code {code}", nodes)  # "CANCELLED by 0"
    return {stage: found.get(job, JobState("UNKNOWN")) for stage, job in jobs.items()}


def _tasks_of(job: str) -> Iterator[str]:
    """9_[0-1,3%2] -> 9_0, 9_1, 9_3."""
    from submitit.slurm.slurm import read_job_id  # brings much that status can do without

    for number, *tasks in read_job_id(job):
        yield from (f"{number}_{task}" for task in range(int(tasks[0]), int(tasks[-1]) + 1)) if tasks else (number,)


def cancel(jobs: dict[str, str]) -> list[str]:
    """Withdraw the active ones; returns their stages."""
    active = [stage for stage, state in job_states(jobs).items() if state.is_active]
    if active:
        _ask(["scancel", *(jobs[stage] for stage in active)])
    return active


def _ask(command: list[str]) -> list[str]:
    """Lines of its output. squeue fails when it knows none of the jobs any more, which is an answer too; sacct where
    there is no accounting."""
    try:
        asked = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{command[0]} does not answer ({error}); ask from a login node of the cluster") from error
    if asked.returncode and command[0] in ("squeue", "scancel") and "Invalid job id" not in asked.stderr:
        raise UserError(f"{command[0]} failed: {' '.join(asked.stderr.split())}; try again")
    return asked.stdout.splitlines()


def array_of(job: str) -> str:
    """9_3 -> 9."""
    return job.partition("_")[0]
