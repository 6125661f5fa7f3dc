"""The folder that a stage writes to: check its inputs, prepare it, and publish it under the stage's name."""

import shutil
from pathlib import Path
from typing import Any

from sparse_train import artifacts, dist
from sparse_train.config import RunConfig
from sparse_train.errors import UserError
from sparse_train.jobs.stage import Stage
from sparse_train.launch.run.folder import partial_folder, read_inputs
from sparse_train.launch.run.sources import sources, why_stale
from sparse_train.launch.worker.process_info import ProcessInfo

_SCRATCH = (artifacts.SOURCES, "checkpoints")


def check_inputs(stage: Stage, config: RunConfig) -> None:
    """Raises UserError unless the inputs are complete and undamaged and the folders to write are this stage's.

    Each rank reads its share of the files, so call it through dist.agree.
    """
    for folder in (config.path / stage.id, partial_folder(stage, config)):
        artifacts.require_own(folder, stage.id)
    for path in (Path(source.external) for source in stage.inputs if source.external):
        if path.is_absolute() and not path.exists():
            raise UserError(f"stage {stage.id} needs {path}, which does not exist; run what makes it")
    for source in stage.upstream:
        if damage := artifacts.damage(config.path / source.id, dist.share):
            raise UserError(f"stage {stage.id} needs {source.id}, but {damage}; run stage {source.id} "
                            f"(delete {config.path / source.id} if it is damaged)")


def prepare_folder(stage: Stage, config: RunConfig) -> None:
    """Keep what an earlier attempt with the same sources wrote, such as checkpoints; delete everything else."""
    folder = partial_folder(stage, config)
    recorded = folder / artifacts.SOURCES
    if recorded.is_file() and not why_stale(artifacts.read_json(recorded), stage, config):
        return
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path != recorded:  # it names the folder's stage; if this is cut off here, the next attempt needs it
            path.unlink()
    artifacts.write_json(recorded, sources(stage, config))


def publish(stage: Stage, config: RunConfig, metrics: dict[str, Any], seconds: float, process: ProcessInfo) -> None:
    """Sign the stage's folder and give it the stage's name."""
    folder = partial_folder(stage, config)
    artifacts.publish(folder, config.path / stage.id, {
        "stage": stage.id,
        "sources": artifacts.read_json(folder / artifacts.SOURCES),  # as they were when the stage began
        "config": config.model_dump(mode="json"),
        "inputs": {source.stage.id: str(source.path) for source in read_inputs(stage, config)},
        "num_ranks": process.num_ranks, "nodes": process.nodes, "seconds": round(seconds, 3), "metrics": metrics,
    }, _SCRATCH)
