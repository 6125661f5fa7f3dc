"""Run the stages of a config on this machine, in order: skip what is current, start the rest, stop at a failure."""

import contextlib
import fcntl
import os
import platform
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import submitit
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sparse_train.launch import attempts
from sparse_train.launch.cluster import CLUSTER, ClusterConfig
from sparse_train.launch.stages import (
    CONFIG,
    JOB_FILE,
    Stage,
    build_stages,
    is_current,
    log_folder,
    partial_folder,
    progress_file,
    read_run,
    select,
    why_stale,
)

from sparse_train import artifacts
from sparse_train.config import RunConfig
from sparse_train.config_file import dump_config
from sparse_train.errors import UserError

LOCK = ".lock"
_STOP_PATIENCE_S = 120


class StageFailed(Exception):
    """A stage ended without its artifact. The text is one line and names the log."""


def plan(config: RunConfig, names: list[str]) -> list[tuple[Stage, str]]:
    """(stage, why it will run or "current") for each selected stage."""
    stages, found, stale = select(build_stages(config), names), [], set()
    for stage in stages:
        behind = [name for name in stage.inputs if name in stale]
        manifest = artifacts.read_manifest(config.path / stage.id)
        if behind:
            reason = f"{behind[0]} will be new"
        elif manifest is None:
            reason = "not done yet"
        else:
            reason = why_stale(manifest.get("sources"), stage, config) or "current"
        if reason != "current":
            stale.add(stage.id)
        found.append((stage, reason))
    return found


def check_replaced(configs: Sequence[RunConfig], names: list[str], replace: bool) -> None:
    """Raises UserError where a selected stage would take the place of a folder that is not its own, and, without
    `replace`, where it would take that of its finished one."""
    finished = []
    for config in configs:
        for stage, reason in plan(config, names):
            if reason == "current":
                continue
            for folder in (config.path / stage.id, partial_folder(stage, config)):
                artifacts.require_own(folder, stage.id)
            if (config.path / stage.id).exists():
                finished.append((f"{config.name}/{stage.id}" if len(configs) > 1 else stage.id, reason))
    if finished and not replace:
        listed = ", ".join(f"{name} ({reason})" for name, reason in finished)
        raise UserError(f"these finished stages would be done again: {listed}; give --replace to replace them, or "
                        "name=OTHER for a run of its own")


def require_inputs(config: RunConfig, names: list[str]) -> None:
    """Raises UserError where a selected stage reads one that is neither selected nor current."""
    selected = select(build_stages(config), names)
    reasons = {stage.id: reason for stage, reason in plan(config, [])}
    for stage in selected:
        for name in stage.inputs if not is_current(stage, config) else ():
            if name not in [other.id for other in selected] and (reason := reasons[name]) != "current":
                raise UserError(f"stage {stage.id} needs {name}, which is not current ({reason}); add it to --stages")


def run(config: RunConfig, cluster: ClusterConfig, names: list[str], console: Console) -> None:
    """Raises StageFailed or UserError; KeyboardInterrupt after the stage at work has saved its state."""
    with locked(config.path):
        freeze(config, cluster)
        for stage in select(build_stages(config), names):
            if is_current(stage, config):
                console.print(f"[dim]{stage.id:<22} current")
                continue
            seconds = _run_stage(stage, config, cluster, console)
            console.print(f"[bold]{stage.id:<22}[/] done in {seconds:.0f} s")


def freeze(config: RunConfig, cluster: ClusterConfig) -> None:
    """What the processes of a run read: its resolved recipe and where it runs."""
    artifacts.write_text(config.path / CONFIG, dump_config(config))
    artifacts.write_text(config.path / CLUSTER, dump_config(cluster))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The run folder, made where it is missing, for one launcher at a time; the file says which."""
    _require_own_run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder} is in use by another sparse-train; wait for it, or give name=OTHER") from error
        except OSError as error:
            raise UserError(f"{folder} is on storage without file locks ({error.strerror}); mount it with them, as "
                            "Lustre with -o flock, or give folder=ELSEWHERE") from error
        file.truncate(0)
        file.write(f"{platform.node()} {os.getpid()}")
        file.flush()
        yield


def _require_own_run(folder: Path) -> None:
    """It is new, empty, locked by a launcher before, or the copy of a run."""
    if not folder.is_dir() or (folder / LOCK).is_file() or not any(folder.iterdir()):
        return
    try:
        read_run(folder)
    except UserError as error:
        raise UserError(f"{folder} holds files and is not a run folder; give another name or folder") from error


def _run_stage(stage: Stage, config: RunConfig, cluster: ClusterConfig, console: Console) -> float:
    logs = log_folder(stage, config)
    for note in (progress_file(stage, config), logs / JOB_FILE):  # of earlier times, perhaps on SLURM
        note.unlink(missing_ok=True)
    started = time.monotonic()
    num_ranks = cluster.resources(stage.id, stage.distributed).ranks
    job = start_processes(cluster, num_ranks, logs, process, str(config.path.absolute()), stage.id, free_port())
    try:
        _watch(stage, config, job, console)
    except KeyboardInterrupt:
        console.print(f"[yellow]stopping {stage.id}; it saves its state first")
        _stop(job)
        raise
    ending = attempts.read_ending(logs, f"{job.job_id}.0", num_ranks)
    if ending.status == "mistake":
        raise UserError(f"stage {stage.id}: {ending.message}")
    if ending.status == "stopped":
        raise StageFailed(f"stage {stage.id} was stopped and saved its state; the same command goes on from there")
    if ending.status != "finished":
        raise StageFailed(f"stage {stage.id} failed: rank {ending.rank} {ending.message} "
                          f"(log: {rank_log(logs, job.job_id, ending.rank)})")
    return time.monotonic() - started


def rank_log(logs: Path, job: str, rank: int) -> Path:
    return logs / f"{job}_{rank}_log.out"


def start_processes(cluster: ClusterConfig, num_ranks: int, logs: Path, function, *arguments) -> submitit.Job:
    """`function(*arguments)` on as many processes of this machine as ranks."""
    executor = submitit.LocalExecutor(logs)
    executor.update_parameters(tasks_per_node=num_ranks, gpus_per_node=cluster.visible_gpus(num_ranks),
                               timeout_min=7 * 24 * 60, stderr_to_stdout=True)
    # A terminal's Ctrl-C reaches the whole process group; the ranks shall hear of it from us, as SIGTERM.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    given = {key: os.environ.get(key) for key in cluster.environment}
    os.environ.update(cluster.environment)
    try:
        return executor.submit(function, *arguments)
    finally:
        signal.signal(signal.SIGINT, before)
        for key, value in given.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


def process(run_folder: str, stage_id: str, port: int | None = None) -> None:
    """What submitit calls in each process of a stage."""
    # The imports take seconds; submitit's handlers would count a warning in them as an error, or swallow it.
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    from sparse_train.launch.worker import work  # brings DeepSpeed, which only the ranks need

    work(run_folder, stage_id, port)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _watch(stage: Stage, config: RunConfig, job: submitit.Job, console: Console) -> None:
    columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task(stage.id, total=None, note="")
        while job._process.poll() is None:
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
