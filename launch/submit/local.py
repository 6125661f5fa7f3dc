"""Run the stages of a config on this machine, in order: skip what is current, start the rest, stop at a failure."""

import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sparse_train.compat.submitit import local_process
from sparse_train.config import RunConfig
from sparse_train.errors import StageFailed, UserError
from sparse_train.jobs.stage import Stage
from sparse_train.launch.run.cluster import ClusterConfig
from sparse_train.launch.run.folder import JOB_FILE, log_folder, progress_file, read_progress
from sparse_train.launch.run.lock import locked
from sparse_train.launch.run.plan import claim
from sparse_train.launch.run.sources import is_current
from sparse_train.launch.run.stages import build_stages, select
from sparse_train.launch.submit.processes import free_port, start_processes, stop_processes
from sparse_train.launch.worker.endings import describe_stop, rank_log, read_ending
from sparse_train.launch.worker.entry import process
from sparse_train.launch.worker.process_info import Attempt

if TYPE_CHECKING:
    import submitit

_LINE_S = 30  # between lines of progress where there is no terminal


def run(config: RunConfig, cluster: ClusterConfig, names: list[str], console: Console, replace: bool = False) -> None:
    """Raises StageFailed or UserError; KeyboardInterrupt after the running stage has saved its state.

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


def _run_stage(stage: Stage, config: RunConfig, cluster: ClusterConfig, console: Console) -> float:
    logs = log_folder(stage, config)
    for note in (progress_file(stage, config), logs / JOB_FILE):  # of an earlier attempt, perhaps on SLURM
        note.unlink(missing_ok=True)
    started = time.monotonic()
    num_ranks = cluster.resources(stage).ranks
    job = start_processes(cluster, num_ranks, logs, process, str(config.path.absolute()), stage.id, free_port())
    try:
        _watch(stage, config, job, console)
    except BaseException:  # Ctrl-C, a signal, a closed terminal: leave no rank running
        try:
            console.print(f"[yellow]stopping {stage.id}; it saves its state first")
        finally:
            stop_processes(job)
        message = describe_stop(stage, read_ending(logs, Attempt(job.job_id, 0), num_ranks))
        console.print(f"[yellow]{message}", highlight=False, soft_wrap=True)
        raise
    ending = read_ending(logs, Attempt(job.job_id, 0), num_ranks)
    if ending.status == "mistake":
        raise UserError(f"stage {stage.id}: {ending.message}")
    if ending.status == "stopped":
        raise StageFailed(describe_stop(stage, ending))
    if ending.status != "finished":
        raise StageFailed(f"stage {stage.id} failed: rank {ending.rank} {ending.message} "
                          f"(log: {rank_log(logs, job.job_id, ending.rank)})")
    return time.monotonic() - started


def _watch(stage: Stage, config: RunConfig, job: "submitit.Job", console: Console) -> None:
    """Show the progress until the processes have ended, as a bar, or as lines where there is no terminal."""
    columns = (TextColumn("{task.description:<22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("{task.fields[note]}"))
    last_line = time.monotonic()
    if not console.is_terminal:
        console.print(f"{stage.id:<22} started", highlight=False)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task(stage.id, total=None, note="")
        while local_process(job).poll() is None:
            if state := read_progress(stage, config):
                bars.update(bar, completed=state["done"], total=state["total"], note=state["note"])
            if not console.is_terminal and time.monotonic() - last_line > _LINE_S:
                last_line = time.monotonic()
                done = f"{state['done']}/{state['total']} {state['note']}" if state else "at work"
                console.print(f"{stage.id:<22} {done}", highlight=False, markup=False, soft_wrap=True)
            time.sleep(0.2)
