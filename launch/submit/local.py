"""Run the stages of a config on this machine, in order: skip what is current, start the rest, stop at a failure."""

import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sparse_train import artifacts
from sparse_train.compat.submitit import local_process
from sparse_train.config import RunConfig
from sparse_train.config.load import dump_config
from sparse_train.errors import StageFailed, UserError
from sparse_train.jobs.stage import Kind, Stage
from sparse_train.launch.run.cluster import CLUSTER, ClusterConfig
from sparse_train.launch.run.lock import locked, require_own_run
from sparse_train.launch.run.stages import (
    CONFIG,
    JOB_FILE,
    build_stages,
    is_current,
    log_folder,
    partial_folder,
    progress_file,
    read_progress,
    select,
    why_stale,
)
from sparse_train.launch.worker import attempts
from sparse_train.launch.worker.endings import Ending, rank_log, read_ending, write_ending
from sparse_train.launch.worker.process_info import Attempt, current_process

if TYPE_CHECKING:
    import submitit

log = logging.getLogger(__name__)
STOP_PATIENCE_S = 120
_LINE_S = 30  # between lines of progress where there is no terminal


def plan(config: RunConfig, names: list[str]) -> list[tuple[Stage, str]]:
    """(stage, why it will run or "current") for each selected stage."""
    stages, found, stale = select(build_stages(config), names), [], set()
    for stage in stages:
        behind = [source.id for source in stage.upstream if source.id in stale]
        manifest = artifacts.read_manifest(config.path / stage.id)
        if behind:
            reason = f"{behind[0]} will be new"
        elif manifest is None:
            reason = "not done yet"
        else:
            reason = why_stale(manifest.get("sources"), stage, config, manifest.get("config")) or "current"
        if reason != "current":
            stale.add(stage.id)
        found.append((stage, reason))
    return found


def check_replaced(configs: Sequence[RunConfig], names: list[str], replace: bool) -> None:
    """Raises UserError where a run or a selected stage would take a folder that is not its own, and, without `replace`,
    where it would take the place of earlier work."""
    if (told := replaced(configs, names)) and not replace:
        raise UserError(told)


def replaced(configs: Sequence[RunConfig], names: list[str]) -> str:
    """A line on the selected stages that would take the place of a finished one, or begin anew although they have saved
    their state; "" where there is none. Raises UserError as check_replaced does."""
    finished = []
    for config in configs:
        require_own_run(config.path)
        for stage, reason in plan(config, names):
            if reason == "current":
                continue
            for above in Path(stage.id).parents:
                if (config.path / above / artifacts.MANIFEST).is_file():  # replacing that one would remove this one
                    raise UserError(f"{config.path / above} is a finished stage, and {stage.id} would be written into "
                                    "it; give name=OTHER for a run of its own")
            for folder in (config.path / stage.id, partial_folder(stage, config)):
                artifacts.require_own(folder, stage.id)
            if stage.kind is Kind.REPORT:  # seconds of work on what the others measured; nothing of it is lost
                continue
            if artifacts.read_manifest(config.path / stage.id) or (config.path / stage.id).exists():
                lost = f"{stage.id} ({reason})"
            else:
                lost = _saved_state(stage, config, reason)
            if lost:
                finished.append(f"{config.name}/{lost}" if len(configs) > 1 else lost)
    if not finished:
        return ""
    return (f"these stages would be done again: {', '.join(finished)}; give --replace to replace what they have, or "
            "name=OTHER for a run of its own")


def _saved_state(stage: Stage, config: RunConfig, reason: str) -> str:
    """Of a training that is not finished and would begin anew: how far it is, and why it cannot go on."""
    partial = partial_folder(stage, config)
    saved = sorted(path.parent.name for path in partial.glob(f"checkpoints/step-*/{artifacts.DONE}"))
    if not saved or not (partial / artifacts.SOURCES).is_file():
        return ""
    if reason == "not done yet":
        reason = why_stale(artifacts.read_json(partial / artifacts.SOURCES), stage, config) or ""
    return f"{stage.id}, unfinished at {saved[-1]} ({reason})" if reason else ""


def require_inputs(config: RunConfig, names: list[str]) -> None:
    """Raises UserError where a selected stage reads one that is neither selected nor current."""
    selected = select(build_stages(config), names)
    reasons = {stage.id: reason for stage, reason in plan(config, [])}
    for stage in selected:
        for name in [source.id for source in stage.upstream] if not is_current(stage, config) else ():
            if name not in [other.id for other in selected] and (reason := reasons[name]) != "current":
                raise UserError(f"stage {stage.id} needs {name}, which is not current ({reason}); add it to --stages")


def run(config: RunConfig, cluster: ClusterConfig, names: list[str], console: Console, replace: bool = False) -> None:
    """Raises StageFailed or UserError; KeyboardInterrupt after the stage at work has saved its state.

    `replace`: see check_replaced.
    """
    with locked(config.path):
        claim(config, cluster, names, replace)
        for stage in select(build_stages(config), names):
            if is_current(stage, config):
                console.print(f"[dim]{stage.id:<22} current")
                continue
            seconds = _run_stage(stage, config, cluster, console)
            console.print(f"[bold]{stage.id:<22}[/] done in {seconds:.0f} s")


def claim(config: RunConfig, cluster: ClusterConfig, names: list[str], replace: bool) -> None:
    """Under the lock, since another command may have ended meanwhile: what it left is put right and is not replaced
    unasked, and the run's config stands."""
    for stage in build_stages(config):
        artifacts.heal(config.path / stage.id)
    check_replaced([config], names, replace)
    freeze(config, cluster)


def freeze(config: RunConfig, cluster: ClusterConfig) -> None:
    """What the processes of a run read: its resolved recipe and where it runs."""
    artifacts.write_text(config.path / CONFIG, dump_config(config))
    artifacts.write_text(config.path / CLUSTER, dump_config(cluster))


def _run_stage(stage: Stage, config: RunConfig, cluster: ClusterConfig, console: Console) -> float:
    logs = log_folder(stage, config)
    for note in (progress_file(stage, config), logs / JOB_FILE):  # of earlier times, perhaps on SLURM
        note.unlink(missing_ok=True)
    started = time.monotonic()
    num_ranks = cluster.resources(stage).ranks
    job = start_processes(cluster, num_ranks, logs, process, str(config.path.absolute()), stage.id, free_port())
    try:
        _watch(stage, config, job, console)
    except BaseException:  # Ctrl-C, a signal, a terminal that is closed: no rank is left behind
        try:
            console.print(f"[yellow]stopping {stage.id}; it saves its state first")
        finally:
            stop_processes(job)
        told = told_of_stop(stage, read_ending(logs, Attempt(job.job_id, 0), num_ranks))
        console.print(f"[yellow]{told}", highlight=False, soft_wrap=True)
        raise
    ending = read_ending(logs, Attempt(job.job_id, 0), num_ranks)
    if ending.status == "mistake":
        raise UserError(f"stage {stage.id}: {ending.message}")
    if ending.status == "stopped":
        raise StageFailed(told_of_stop(stage, ending))
    if ending.status != "finished":
        raise StageFailed(f"stage {stage.id} failed: rank {ending.rank} {ending.message} "
                          f"(log: {rank_log(logs, job.job_id, ending.rank)})")
    return time.monotonic() - started


def told_of_stop(stage: Stage, ending: Ending) -> str:
    """What a stage that was stopped came to, and what the same command will do."""
    if ending.status == "finished":
        return f"{stage.id} was finished; the same command goes on behind it"
    if not stage.is_distributed:
        return f"{stage.id} was stopped; the same command starts it again"
    if ending.status == "stopped":
        return f"{stage.id} was stopped and saved its state; the same command goes on from there"
    return f"{stage.id} ended before it could save; the same command goes on from its newest checkpoint"


def take_signals() -> None:
    """kill, a closing batch system and a terminal that goes away end a run as Ctrl-C does; without this its ranks would
    be left behind. Only the first such signal counts: the ranks are given time to save."""
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]

    def end(*_) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in numbers:  # nohup has SIGHUP ignored
        signal.signal(number, end)


def start_processes(cluster: ClusterConfig, num_ranks: int, logs: Path, function, *arguments) -> "submitit.Job":
    """`function(*arguments)` on as many processes of this machine as ranks."""
    import submitit  # which looking at runs can do without

    log.info("starting %d processes, whose output is in %s", num_ranks, logs)
    executor = submitit.LocalExecutor(logs.absolute())
    executor.update_parameters(tasks_per_node=num_ranks, gpus_per_node=cluster.visible_gpus(num_ranks),
                               timeout_min=7 * 24 * 60, stderr_to_stdout=True)
    # A terminal's Ctrl-C and its end reach the whole process group; the ranks hear of it from us, as SIGTERM.
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    # Safe path: else a random.py in the folder that this was started in comes before Python's own.
    environment = {"PYTHONSAFEPATH": "1", **cluster.environment}
    given = {key: os.environ.get(key) for key in environment}
    os.environ.update(environment)
    try:
        return executor.submit(function, *arguments)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for key, value in given.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


def process(run_folder: str, stage_id: str, port: int | None = None) -> None:
    """What submitit calls in each process of a stage."""
    # The imports take seconds; submitit's handlers would count a warning in them as an error, or swallow it.
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    try:
        from sparse_train.launch.worker.process import work  # brings DeepSpeed, which only the ranks need
    except Exception as error:
        info, logs = current_process(), Path(run_folder) / "logs" / stage_id
        if info.rank == 0:
            attempts.begin(logs, info, 0)
        told = f"could not be started: {type(error).__name__}: {' '.join(str(error).split())}"
        write_ending(logs, info.attempt, Ending("broken", told, info.rank))
        raise
    work(run_folder, stage_id, port)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def _watch(stage: Stage, config: RunConfig, job: "submitit.Job", console: Console) -> None:
    """Until its processes have ended: a bar, or lines where there is no terminal."""
    columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("{task.fields[note]}"))
    told = time.monotonic()
    if not console.is_terminal:
        console.print(f"{stage.id:<22} started", highlight=False)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task(stage.id, total=None, note="")
        while local_process(job).poll() is None:
            if state := read_progress(stage, config):
                bars.update(bar, completed=state["done"], total=state["total"], note=state["note"])
            if not console.is_terminal and time.monotonic() - told > _LINE_S:
                told = time.monotonic()
                done = f"{state['done']}/{state['total']} {state['note']}" if state else "at work"
                console.print(f"{stage.id:<22} {done}", highlight=False, markup=False, soft_wrap=True)
            time.sleep(0.2)


def stop_processes(job: "submitit.Job", patience_s: float = STOP_PATIENCE_S) -> None:
    """Let the ranks save; what still runs after the patience, or at a second Ctrl-C, is killed."""
    process = local_process(job)
    everyone = [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
    process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + patience_s
    try:
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
    finally:
        process.kill()
        for one in everyone:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
