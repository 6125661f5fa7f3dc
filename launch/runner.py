"""Run the stages of a config in order: skip what is current, submit the rest, show progress, stop at a failure."""

import contextlib
import fcntl
import signal
import socket
import time
from pathlib import Path

import psutil
import submitit
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from launch.cluster import ClusterConfig
from launch.stages import CONFIG, Ending, Stage, build_stages, is_current, log_folder, progress_file, select
from sparse_train import artifacts
from sparse_train.config import RunConfig, dump_config
from sparse_train.errors import UserError

_STOP_PATIENCE_S = 120
_NO_RESULT = "ended without a result; it was killed, or ran out of memory"


class StageFailed(Exception):
    """A stage ended without its artifact. The text is one line and names the log."""


def plan(config: RunConfig, names: list[str]) -> list[tuple[Stage, str]]:
    """(stage, why it will run or "current") for each selected stage."""
    stages, found, stale = select(build_stages(config), names), [], set()
    for stage in stages:
        behind = [name for name in stage.inputs if name in stale]
        finished = artifacts.read_manifest(config.path / stage.id) is not None
        if not behind and is_current(stage, config):
            found.append((stage, "current"))
            continue
        stale.add(stage.id)
        if behind:
            reason = f"{behind[0]} will be new"
        else:
            reason = "its config or inputs changed" if finished else "not done yet"
        found.append((stage, reason))
    return found


def run(config: RunConfig, cluster: ClusterConfig, names: list[str], console: Console) -> None:
    """Raises StageFailed or UserError; KeyboardInterrupt after the stage at work has saved its state."""
    config.path.mkdir(parents=True, exist_ok=True)
    with _lock(config.path):
        artifacts.write_text(config.path / CONFIG, dump_config(config))
        for stage in select(build_stages(config), names):
            if is_current(stage, config):
                console.print(f"[dim]{stage.id:<22} current")
                continue
            _require_inputs(stage, config)
            seconds = _run_stage(stage, config, cluster, console)
            console.print(f"[bold]{stage.id:<22}[/] done in {seconds:.0f} s")


@contextlib.contextmanager
def _lock(folder: Path):
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{folder} is in use by another sparse-train; wait for it, or give name=OTHER") from error
        yield


def _require_inputs(stage: Stage, config: RunConfig) -> None:
    for name in stage.inputs:
        damage = artifacts.damage(config.path / name)
        if damage:
            raise UserError(f"stage {stage.id} needs {name}, but {damage}; run stage {name} "
                            f"(delete {config.path / name} if it is damaged)")


def _run_stage(stage: Stage, config: RunConfig, cluster: ClusterConfig, console: Console) -> float:
    logs = log_folder(stage, config)
    progress_file(stage, config).unlink(missing_ok=True)
    started = time.monotonic()
    job = _submit(stage, config, cluster, logs)
    try:
        _watch(stage, config, job, console)
    except KeyboardInterrupt:
        console.print(f"[yellow]stopping {stage.id}; it saves its state first")
        _stop(job)
        raise
    ending = _ending(stage, job, logs)
    if ending.status == "mistake":
        raise UserError(f"stage {stage.id}: {ending.message}")
    if ending.status == "stopped":
        raise StageFailed(f"stage {stage.id} was stopped and saved its state; the same command goes on from there")
    return time.monotonic() - started


def _submit(stage: Stage, config: RunConfig, cluster: ClusterConfig, logs: Path) -> submitit.Job:
    return start_processes(cluster, cluster.ranks if stage.distributed else 1, logs, _process, str(config.path),
                           stage.id, free_port())


def start_processes(cluster: ClusterConfig, num_ranks: int, logs: Path, function, *arguments) -> submitit.Job:
    """`function(*arguments)` on as many processes as ranks."""
    executor = submitit.LocalExecutor(logs)
    executor.update_parameters(tasks_per_node=num_ranks, gpus_per_node=cluster.visible_gpus(),
                               timeout_min=cluster.timeout_min, stderr_to_stdout=True)
    # A terminal's Ctrl-C reaches the whole process group; the ranks shall hear of it from us, as SIGTERM.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return executor.submit(function, *arguments)
    finally:
        signal.signal(signal.SIGINT, before)


def _process(run_folder: str, stage_id: str, port: int) -> Ending:
    from launch.worker import work  # brings DeepSpeed, which only the ranks need

    return work(run_folder, stage_id, port)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _watch(stage: Stage, config: RunConfig, job: submitit.Job, console: Console) -> None:
    columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task(stage.id, total=None, note="")
        while not job.done():
            with contextlib.suppress(UserError):
                state = artifacts.read_json(progress_file(stage, config))
                bars.update(bar, completed=state["done"], total=state["total"], note=state["note"])
            time.sleep(0.2)


def _stop(job: submitit.Job) -> None:
    """Let the ranks save; what still runs after the patience, or at a second Ctrl-C, is killed."""
    process = job._process  # submitit's cancel() sends SIGINT and kills a second later, in the middle of a save
    everyone = [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
    process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + _STOP_PATIENCE_S
    try:
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
    finally:
        process.kill()
        for one in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()


def _ending(stage: Stage, job: submitit.Job, logs: Path) -> Ending:
    """The most telling of the ranks' endings: a mistake, then one that broke, then the rest."""
    endings, broken = [], []
    for task in range(job.num_tasks):
        try:
            endings.append(job.task(task).result())
        except submitit.core.utils.UncompletedJobError as error:  # a FailedJobError is one, with a traceback
            broken.append((f"rank {task} {_cause(error)}", logs / f"{job.job_id}_{task}_log.out"))
    for ending in endings:
        if ending.status == "mistake":
            return ending
    if broken:
        # Ranks that lost a peer complain about the connection, or were ended with it; the first cause did neither.
        line, log = min(broken, key=lambda pair: "onnection" in pair[0] or _NO_RESULT in pair[0])
        raise StageFailed(f"stage {stage.id} failed: {line} (log: {log})")
    return endings[0]


def _cause(error: submitit.core.utils.UncompletedJobError) -> str:
    """The traceback's last line, or that there is none."""
    if not isinstance(error, submitit.core.utils.FailedJobError):
        return _NO_RESULT
    lines = str(error).partition("You can check full logs")[0].splitlines()
    return [line.strip() for line in lines if line.strip(" -")][-1]
