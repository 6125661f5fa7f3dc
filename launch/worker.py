"""What each process of a stage runs: join the ranks, do the job, sign its folder on rank 0."""

import importlib
import os
import shutil
import signal
import time
from pathlib import Path

import submitit
import torch

from jobs.job import Job, Stopped
from launch.stages import CONFIG, Ending, Stage, build_stages, input_paths, partial_folder, progress_file, stage_key
from sparse_train import artifacts, dist
from sparse_train.config import RunConfig, load_config
from sparse_train.errors import UserError
from sparse_train.tracking import Progress


def work(run_folder: str, stage_id: str, port: int) -> Ending:
    """Run one stage of the run in `run_folder`; each rank calls this. Anything but a UserError propagates."""
    # submitit ignores SIGTERM; until training takes it over, it should end the process.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    config = load_config(RunConfig, Path(run_folder) / CONFIG)
    stage = next(stage for stage in build_stages(config) if stage.id == stage_id)
    num_ranks = submitit.JobEnvironment().num_tasks
    try:
        if stage.distributed:
            join_ranks(port)
        metrics, started = _run_job(stage, config)
        if dist.rank() == 0:
            _publish(stage, config, metrics, time.time() - started, num_ranks)
        dist.barrier()
        return Ending("finished")
    except Stopped:
        return Ending("stopped")
    except UserError as error:
        return Ending("mistake", str(error))
    finally:
        dist.stop()


def join_ranks(port: int) -> None:
    """Make this process the rank that submitit started it as."""
    environment = submitit.JobEnvironment()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // environment.num_tasks))
    dist.start(environment.global_rank, environment.num_tasks, environment.local_rank, environment.hostnames[0], port)


def _run_job(stage: Stage, config: RunConfig):
    out, key = partial_folder(stage, config), stage_key(stage, config)
    if dist.rank() == 0:
        _prepare(out, key)
    dist.barrier()
    job = Job(config, out, input_paths(stage, config), Progress(progress_file(stage, config)), stage.loss,
              stage.level)
    started = time.time()
    return importlib.import_module(f"jobs.{stage.job}").run(job), started


def _prepare(out: Path, key: str) -> None:
    """Keep what an earlier try at the same key left, such as its checkpoints; clear what belongs to another."""
    note = out / "key"
    if not note.is_file() or note.read_text() != key:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        artifacts.write_text(note, key)


def _publish(stage: Stage, config: RunConfig, metrics: dict, seconds: float, num_ranks: int) -> None:
    out, key = partial_folder(stage, config), stage_key(stage, config)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    (out / "key").unlink()
    artifacts.publish(out, config.path / stage.id, {
        "stage": stage.id, "key": key, "config": config.model_dump(mode="json"),
        "inputs": {name: str(path) for name, path in input_paths(stage, config).items()},
        "num_ranks": num_ranks, "seconds": round(seconds, 3), "metrics": metrics,
    })
