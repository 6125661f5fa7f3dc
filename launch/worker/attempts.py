"""Attempts at a stage, recorded in files that every node can read.

    RUN/logs/STAGE/attempts.jsonl    one AttemptRecord per line
    RUN/logs/STAGE/attempt           JOB.RESTARTS of the newest; an older one that still runs must not write
    RUN/logs/STAGE/requeues          JOB.RESTARTS of the attempts that requeue.py requeued, rather than SLURM
"""

import contextlib
import json
import time
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from sparse_train import artifacts
from sparse_train.launch.worker.process_info import Attempt, ProcessInfo


class AttemptRecord(BaseModel):
    """A line of attempts.jsonl."""

    model_config = ConfigDict(frozen=True, strict=True)

    id: Annotated[str, Field(pattern=r"\.\d+$")]
    """The attempt, as JOB.RESTARTS."""
    job: str
    nodes: tuple[str, ...] = ()
    ranks: int
    from_step: int
    """How far what it continued from was: a training's step, a pruning's blocks, an evaluation's batches; 0 from the
    beginning."""
    started: float = 0.0
    """Seconds since the epoch."""

    @property
    def attempt(self) -> Attempt:
        return Attempt.parse(self.id)


class Superseded(Exception):
    """A newer attempt works on the stage; this one must not write any more."""


def begin(logs: Path, process: ProcessInfo, from_step: int) -> None:
    """Record the attempt. One rank calls this, before any of them writes anything else."""
    logs.mkdir(parents=True, exist_ok=True)  # missing where the job is a task of an array, whose output is elsewhere
    artifacts.write_text(logs / "attempt", str(process.attempt))
    record = AttemptRecord(id=str(process.attempt), job=process.attempt.job, nodes=process.nodes,
                           ranks=process.num_ranks, from_step=from_step, started=time.time())
    with open(logs / "attempts.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(record.model_dump()) + "\n")


def read_attempts(logs: Path) -> list[AttemptRecord]:
    """Oldest first."""
    records, file = [], logs / "attempts.jsonl"
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []:
        with contextlib.suppress(ValueError):  # half a line, where a node died
            records.append(AttemptRecord.model_validate_json(line))
    return records


def require_newest(logs: Path, attempt: Attempt) -> None:
    """Raises Superseded where another attempt has begun since."""
    newest = (logs / "attempt").read_text(encoding="utf-8")
    if newest != str(attempt):
        raise Superseded(f"attempt {attempt} ends here: {newest} works on the stage")


def note_requeue(logs: Path, attempt: Attempt) -> None:
    logs.mkdir(parents=True, exist_ok=True)  # missing where the attempt failed before it began
    with open(logs / "requeues", "a", encoding="utf-8") as file:
        file.write(f"{attempt}\n")


def count_attempts(logs: Path, attempt: Attempt) -> int:
    """How many attempts of this job made no progress beyond the step that this one began at: this one, and the earlier
    ones after which requeue.py requeued it. Requeues by SLURM, after a preemption or a lost node, do not count."""
    file = logs / "requeues"
    requeued = file.read_text(encoding="utf-8").split() if file.is_file() else []
    steps = {record.attempt: record.from_step for record in read_attempts(logs)}
    step, count = steps.get(attempt), 1
    for restarts in reversed(range(attempt.restarts)):
        earlier = Attempt(attempt.job, restarts)  # without a step where it ended before it began
        if step is not None and steps.get(earlier, step) != step:
            break
        step = steps.get(earlier, step)
        count += str(earlier) in requeued
    return count
