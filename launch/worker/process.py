"""What each process of a stage runs: join the ranks, do the job, sign its folder on rank 0, and say how it ended.

    python -m sparse_train.launch.worker.process RUN STAGE     under srun; without it submitit calls work()
"""

import contextlib
import errno
import importlib
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch

from sparse_train import artifacts, dist, storage
from sparse_train.config import RunConfig
from sparse_train.config.load import load_config
from sparse_train.cpus import set_threads
from sparse_train.errors import UserError
from sparse_train.heartbeat import Pulse
from sparse_train.jobs.job import Job, Stopped
from sparse_train.launch.run.cluster import CLUSTER, ClusterConfig
from sparse_train.launch.run.stages import (
    Stage,
    find_stage,
    input_paths,
    is_current,
    log_folder,
    partial_folder,
    progress_file,
    read_run,
    sources,
    why_stale,
)
from sparse_train.launch.worker import attempts, rank_checks
from sparse_train.launch.worker.attempts import EXIT_CODES, Ending, Superseded
from sparse_train.launch.worker.process_info import Place, deadline, find_place
from sparse_train.tracking import Progress, log_results
from sparse_train.training import checkpoint

_PUBLISHED = "published"
_SCRATCH = (artifacts.SOURCES, "checkpoints")


def work(run_folder: str, stage_id: str, port: int | None = None) -> None:
    """Run one stage of the run in `run_folder`; each rank calls this. Exits with the ending's code unless it is 0.

    `port`: of the rendezvous; None takes the place's own.
    """
    place = find_place()
    config = read_run(Path(run_folder))
    cluster = load_config(ClusterConfig, config.path / CLUSTER)
    stage = find_stage(config, stage_id)
    for number in (signal.SIGTERM, signal.SIGUSR2):
        # submitit's handlers would save on one rank only. Training takes over with its own; joining the ranks waits in
        # native code, where no handler of Python's would run.
        signal.signal(number, signal.SIG_DFL if stage.distributed else _raise_stopped)
    logs = log_folder(stage, config)

    def do() -> None:
        attempts.reserve_ending(logs, place.attempt, place.rank)
        _work(place, config, cluster, stage, port or place.port)

    ending = _ending_of(place, do, config.path)
    with contextlib.suppress(OSError):  # a disk that is full; what is left is the exit code
        if ending is not None:
            attempts.write_ending(logs, place.attempt, ending)
    status = ending.status if ending else "broken"
    if status == "finished":
        return
    for stream in (sys.stderr, sys.stdout):
        with contextlib.suppress(OSError):
            stream.flush()
    # Not sys.exit: where a rank is gone, closing the process group may wait for it.
    os._exit(EXIT_CODES[status])


def _raise_stopped(number, frame):
    raise Stopped(number)


def _ending_of(place: Place, do: Callable[[], None], run: Path = Path()) -> Ending | None:
    """None when another attempt has taken over."""
    try:
        do()
        return Ending("finished", rank=place.rank)
    except Stopped:
        return Ending("stopped", "it was asked to stop, or its time ran out", place.rank)
    except UserError as error:
        _print(str(error))
        return Ending("mistake", str(error), place.rank)
    except Superseded as error:
        _print(str(error))
        return None
    except Exception as error:
        _print(traceback.format_exc())
        if line := storage.told(error, run):
            _print(line)
            return Ending("mistake", line, place.rank)
        lines = str(error).strip().splitlines() or [""]
        told = "; ".join([f"{type(error).__name__}: {lines[-1]}", *getattr(error, "__notes__", ())])
        return Ending("lost" if _may_pass(error) else "broken", told, place.rank)


def _print(text: str) -> None:
    with contextlib.suppress(OSError):  # the log may be on the disk that is full
        print(text, file=sys.stderr, flush=True)


def _may_pass(error: Exception) -> bool:
    """A lost peer, or shared storage that stumbled. gloo raises plain RuntimeErrors, the other backends subclasses of
    DistError."""
    told = str(error)
    if isinstance(error, OSError) and error.errno in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT):
        return True
    return isinstance(error, torch.distributed.DistError) or (isinstance(error, RuntimeError) and (
        "Connection" in told or "gloo" in told))


def _work(place: Place, config: RunConfig, cluster: ClusterConfig, stage: Stage, port: int) -> None:
    if is_current(stage, config):  # of an array of which another task is to run, or requeued after its end
        return
    logs = log_folder(stage, config)
    started = time.time()
    if place.rank == 0:  # before anything can go wrong, and before an attempt that is still alive somewhere writes more
        attempts.begin(logs, place, checkpoint.newest_step(partial_folder(stage, config) / "checkpoints"))
    pulse = join_ranks(place, cluster, port, logs) if stage.distributed else None
    if not stage.distributed:
        set_threads()
    if stage.distributed and cluster.preflight:
        rank_checks.check_ranks(place, config, stage)
    ends = deadline() if place.rank == 0 else None
    try:
        dist.agree(lambda: _require_inputs(stage, config))
        metrics = _run_job(place, stage, config, ends)
    except Stopped as stop:
        # SLURM's warning may come a minute early. A preempted one is tried again, and has all of its time again.
        if stop.args == (signal.SIGUSR2,) and ends and time.time() > ends - cluster.warning_s - 60:
            raise UserError(f"stage {stage.id} met its time limit and keeps no state to go on from; give it more: "
                            f"cluster.stages.{stage.job}.time=...") from None
        raise
    except Exception as error:
        if pulse and pulse.stall:
            error.add_note(pulse.stall)
        raise
    if place.rank == 0:
        attempts.require_newest(logs, place.attempt)
        _publish(stage, config, metrics, time.time() - started, place)
    if pulse:  # to read a large model back and sign it takes rank 0 longer than a collective may
        pulse.tell(_PUBLISHED) if place.rank == 0 else pulse.wait_for(_PUBLISHED)
    dist.barrier()
    if pulse:
        pulse.stop()
    dist.stop()


def join_ranks(place: Place, cluster: ClusterConfig, port: int, logs: Path | None = None) -> Pulse:
    """Make this process the rank that it was started as, and watch over the others."""
    set_threads(place.ranks_on_node)
    # Twice as long as silence: a time-out of a collective cannot say whose fault it is, the pulse can.
    dist.start(place.rank, place.num_ranks, place.local_rank, place.ranks_on_node, place.nodes[0], port,
               timedelta(seconds=2 * cluster.silence_s))

    def give_up(silence: str) -> None:
        # Storage may be behind the cut as well: what follows must not wait for it.
        timer = threading.Timer(10, os._exit, (EXIT_CODES["lost"],))
        timer.daemon = True
        timer.start()
        _print(f"giving up: {silence}")
        if logs is not None:
            with contextlib.suppress(OSError):
                attempts.write_ending(logs, place.attempt, Ending("lost", silence, place.rank))
        os._exit(EXIT_CODES["lost"])

    return Pulse(place.host, place.nodes[0], cluster.silence_s, give_up)


def _require_inputs(stage: Stage, config: RunConfig) -> None:
    """The ranks share the reading."""
    for folder in (config.path / stage.id, partial_folder(stage, config)):
        artifacts.require_own(folder, stage.id)
    for path in map(Path, stage.external.values()):
        if path.is_absolute() and not path.is_dir():
            raise UserError(f"stage {stage.id} needs {path}, which is not there; run what makes it")
    for name in stage.inputs:
        if damage := artifacts.damage(config.path / name, dist.share):
            raise UserError(f"stage {stage.id} needs {name}, but {damage}; run stage {name} "
                            f"(delete {config.path / name} if it is damaged)")


def _run_job(place: Place, stage: Stage, config: RunConfig, ends: float | None) -> dict:
    out = partial_folder(stage, config)
    if place.rank == 0:
        _prepare(out, stage, config)
    dist.barrier()

    def guard() -> None:
        attempts.require_newest(log_folder(stage, config), place.attempt)

    job = Job(config, out, input_paths(stage, config), Progress(progress_file(stage, config), guard),
              stage.id, stage.level, ends, guard)
    return importlib.import_module(f"sparse_train.jobs.{stage.job}").run(job)


def _prepare(out: Path, stage: Stage, config: RunConfig) -> None:
    """Keep what an earlier attempt with the same sources left, such as its checkpoints; clear what had others."""
    note = out / artifacts.SOURCES
    if not note.is_file() or why_stale(artifacts.read_json(note), stage, config):
        out.mkdir(parents=True, exist_ok=True)
        for path in out.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path != note:  # which stays: cut off here, the folder must still be known as this stage's
                path.unlink()
        artifacts.write_json(note, sources(stage, config))


def _publish(stage: Stage, config: RunConfig, metrics: dict, seconds: float, place: Place) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR2):  # it is as good as done
        signal.signal(number, signal.SIG_IGN)
    sourced = artifacts.read_json(partial_folder(stage, config) / artifacts.SOURCES)  # as they were when it began
    artifacts.publish(partial_folder(stage, config), config.path / stage.id, {
        "stage": stage.id, "sources": sourced, "config": config.model_dump(mode="json"),
        "inputs": {name: str(path) for name, path in input_paths(stage, config).items()},
        "num_ranks": place.num_ranks, "nodes": place.nodes, "seconds": round(seconds, 3), "metrics": metrics,
    }, _SCRATCH)
    if not stage.distributed and config.tracking.wandb:
        log_results(config.path, stage.id, metrics, config.tracking.wandb)


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2])
