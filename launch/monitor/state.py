"""The state of each stage of a run, from its files and from SLURM."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any

from rich.console import Console

from sparse_train import artifacts
from sparse_train.config import RunConfig
from sparse_train.errors import UserError, describe_error
from sparse_train.jobs.stage import Stage
from sparse_train.launch.run.folder import log_folder, read_progress
from sparse_train.launch.run.lock import find_launcher
from sparse_train.launch.run.plan import PlannedStage, PlanStatus, plan
from sparse_train.launch.run.slurm_queue import JobState, job_states, read_jobs
from sparse_train.launch.run.sources import is_dense_of_sweep
from sparse_train.launch.run.stages import build_stages, select
from sparse_train.launch.worker.attempts import AttemptRecord, read_attempts
from sparse_train.launch.worker.endings import newest_ending


class State(Enum):
    DONE = auto()
    RUNNING = auto()
    QUEUED = auto()
    """Its job waits, or SLURM is starting or ending it."""
    FAILED = auto()
    CANCELLED = auto()
    HELD = auto()
    """Its job was withdrawn because an input failed."""
    TO_DO = auto()
    UNREADABLE = auto()


@dataclass(frozen=True)
class Verdict:
    state: State
    text: str
    """As printed, with the cause."""


@dataclass(frozen=True)
class StageStatus:
    stage: Stage
    state: State
    text: str
    job: str = ""
    nodes: str = ""
    num_attempts: int = 0
    progress: dict[str, Any] | None = None


@dataclass(frozen=True)
class RunFiles:
    """What the files of a run say about its stages."""

    config: RunConfig
    planned: list[PlannedStage]
    jobs: dict[str, str]


def read_files(config: RunConfig) -> RunFiles:
    """Raises UserError or OSError where the run cannot be read at all. The reason of a broken stage is its error."""
    names = ["dense"] if is_dense_of_sweep(config) else []
    try:
        planned = plan(config, names)
    except (UserError, OSError):
        planned = [plan_alone(stage, config) for stage in select(build_stages(config), names)]
    return RunFiles(config, planned, read_jobs(config.path))


def plan_alone(stage: Stage, config: RunConfig) -> PlannedStage:
    """The stage as `plan` describes it, also where this stage or another one is broken."""
    try:
        return next(planned for planned in plan(config, [stage.id]) if planned.stage.id == stage.id)
    except (UserError, OSError) as error:
        return PlannedStage(stage, PlanStatus.BROKEN, describe_error(error))


def read_status(runs: Sequence[RunFiles], console: Console) -> list[list[StageStatus]]:
    """The stages of each run. SLURM is queried once for all stages that are not done; where it does not answer, that
    is printed, and the status comes from the files alone."""
    jobs = {(index, planned.stage.id): run.jobs[planned.stage.id] for index, run in enumerate(runs)
            for planned in run.planned if not planned.is_current and planned.stage.id in run.jobs}
    try:
        states = job_states(jobs)
    except UserError as error:
        console.print(f"{error}; below is what the files say", style="yellow", highlight=False, markup=False,
                      soft_wrap=True)
        states = {}
    return [_status_of_run(run, {stage: state for (number, stage), state in states.items() if number == index})
            for index, run in enumerate(runs)]


def _status_of_run(run: RunFiles, states: Mapping[str, JobState]) -> list[StageStatus]:
    statuses: list[StageStatus] = []
    for planned in run.planned:
        stage = planned.stage
        unfinished = [status.stage.id for status in statuses
                      if status.state in (State.FAILED, State.CANCELLED, State.HELD)]
        try:
            if planned.is_current:
                statuses.append(_status_of_done(run, stage))
            else:
                statuses.append(_status_of_stage(run, stage, planned.reason, states.get(stage.id), unfinished))
        except (UserError, OSError) as error:  # such as logs of another user's
            statuses.append(StageStatus(stage, State.UNREADABLE, describe_error(error)))
    return statuses


def _status_of_done(run: RunFiles, stage: Stage) -> StageStatus:
    records = read_attempts(log_folder(stage, run.config))
    manifest = artifacts.read_manifest(run.config.path / stage.id) or {}
    seconds, nodes = manifest.get("seconds"), manifest.get("nodes") or ()
    text = f"done in {seconds:.0f} s" if isinstance(seconds, int | float) else "done"
    node_names = ",".join(map(str, nodes[:2])) + (f" and {len(nodes) - 2} more" if len(nodes) > 2 else "")
    return StageStatus(stage, State.DONE, text, run.jobs.get(stage.id, ""), node_names, len(records))


def _status_of_stage(run: RunFiles, stage: Stage, reason: str, job: JobState | None,
                     unfinished: list[str]) -> StageStatus:
    records = read_attempts(log_folder(stage, run.config))
    if job is None or job.state == "UNKNOWN":
        verdict = _judge_files(run.config, stage, reason, records)
    else:
        verdict = _judge_job(run.config, stage, reason, job, records, unfinished)
    # The progress of a finished stage says nothing about why it will run again.
    is_old = verdict.state is State.TO_DO and (run.config.path / stage.id / artifacts.DONE).is_file()
    return StageStatus(stage, verdict.state, verdict.text, run.jobs.get(stage.id, ""),
                       job.nodes if job and job.state == "RUNNING" else "", len(records),
                       None if is_old else read_progress(stage, run.config))


def _judge_files(config: RunConfig, stage: Stage, reason: str, records: list[AttemptRecord]) -> Verdict:
    ending = newest_ending(log_folder(stage, config), records)
    if records and ending is None and find_launcher(config.path) is not None:
        return Verdict(State.RUNNING, "running")
    if ending and ending.status in ("broken", "lost", "mistake"):
        return Verdict(State.FAILED, f"failed: {ending.message}")
    return Verdict(State.TO_DO, reason)


def _judge_job(config: RunConfig, stage: Stage, reason: str, job: JobState, records: list[AttemptRecord],
               unfinished: list[str]) -> Verdict:
    if job.state == "PENDING":
        return Verdict(State.QUEUED, f"waiting ({job.reason or 'starting'})")
    if job.is_active:
        return Verdict(State.RUNNING if job.state == "RUNNING" else State.QUEUED, job.state.lower())
    if job.state == "COMPLETED":
        return Verdict(State.TO_DO, reason)
    ending = newest_ending(log_folder(stage, config), records)
    cause = f"rank {ending.rank} {ending.message}" if ending and ending.status != "finished" else job.reason
    if job.state != "CANCELLED":
        return Verdict(State.FAILED, f"failed: {job.state} {cause}")
    if missing := _missing_input(stage, unfinished):
        return Verdict(State.HELD, f"held: {missing} did not finish")
    return Verdict(State.CANCELLED, f"cancelled: {job.state} {cause}")


def _missing_input(stage: Stage, unfinished: list[str]) -> str:
    """An input that did not finish; "" where there is none."""
    for source in stage.upstream:
        if source.id in unfinished:
            return source.id
    for source in stage.inputs:
        path = Path(source.external or "")  # such as the shared dense model of a sweep
        if path.is_absolute() and not path.exists():
            return "/".join(path.parts[-2:])
    return ""
