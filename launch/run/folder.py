"""The folder of a run: where its config and each stage's result, logs and progress are.

    RUN/config.yaml, RUN/cluster.yaml     the resolved recipe and where it runs; the processes of the run read these
    RUN/STAGE, RUN/STAGE.partial          a finished result; one that is being written
    RUN/logs/STAGE                        its processes' output, its progress, its attempts and their endings
"""

import contextlib
from pathlib import Path
from typing import Any

from sparse_train import artifacts
from sparse_train.config import RunConfig
from sparse_train.config.load import dump_config, load_frozen
from sparse_train.errors import UserError
from sparse_train.jobs.job import Input
from sparse_train.jobs.stage import Stage
from sparse_train.launch.run.cluster import CLUSTER, ClusterConfig

CONFIG, JOB_FILE = "config.yaml", "job"


def read_run(folder: Path) -> RunConfig:
    """The config of the run in `folder`, with `folder` as its path, wherever it was first written. Raises UserError."""
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is not a run folder: it has no {CONFIG}; give the folder of a run")
    folder = folder.absolute()
    return load_frozen(folder / CONFIG).model_copy(update={"folder": str(folder.parent), "name": folder.name})


def freeze(config: RunConfig, cluster: ClusterConfig) -> None:
    """Write what the processes of a run read: its resolved recipe and where it runs."""
    artifacts.write_text(config.path / CONFIG, dump_config(config))
    artifacts.write_text(config.path / CLUSTER, dump_config(cluster))


def read_inputs(stage: Stage, config: RunConfig) -> tuple[Input, ...]:
    """The results that the stage reads, in the order of stage.inputs."""
    return tuple(Input(source, source.external or config.path / source.id) for source in stage.inputs)


def partial_folder(stage: Stage, config: RunConfig) -> Path:
    return config.path / f"{stage.id}.partial"


def log_folder(stage: Stage, config: RunConfig) -> Path:
    return config.path / "logs" / stage.id


def progress_file(stage: Stage, config: RunConfig) -> Path:
    return log_folder(stage, config) / "progress.json"


def read_progress(stage: Stage, config: RunConfig) -> dict[str, Any] | None:
    """What sparse_train.tracking.Progress wrote last; None where there is no file, or it cannot be read."""
    types = {"done": int, "total": int, "note": str, "seconds_left": int | float | None}
    with contextlib.suppress(UserError, OSError):
        progress = artifacts.read_json(progress_file(stage, config))
        if isinstance(progress, dict) and all(isinstance(progress.get(key), kind) for key, kind in types.items()):
            return progress
    return None
