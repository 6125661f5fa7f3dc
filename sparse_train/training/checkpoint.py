"""Checkpoints of a training job: written by all ranks aside, renamed, signed; the newest sound one is resumed from.

    FOLDER/step-000100/engine/...      DeepSpeed's files, one set per rank: parameters, bits, optimizer
    FOLDER/step-000100/manifest.json   step, world size, digests of all files; then DONE

Only files that this job signed are read back.
"""

import logging
import shutil
from pathlib import Path

from sparse_train import artifacts, dist
from sparse_train.errors import UserError

log = logging.getLogger(__name__)
_KEEP = 2
_ENGINE = "engine"


def save(engine, folder: Path, step: int) -> None:
    """Collective. Keeps the newest two checkpoints."""
    final = folder / f"step-{step:08d}"
    partial = final.with_suffix(".partial")
    if dist.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(partial), tag=_ENGINE, save_latest=False)
    dist.barrier()
    if dist.rank() == 0:
        artifacts.publish(partial, final, {"step": step, "world_size": dist.world_size()})
        for old in _signed(folder)[:-_KEEP]:
            shutil.rmtree(old)
    dist.barrier()


def resume(engine, folder: Path) -> int:
    """Collective. Load the newest sound checkpoint into `engine`; returns its step, 0 when there is none."""
    newest = next((path for path in reversed(_signed(folder)) if _is_sound(path)), None)
    if newest is None:
        return 0
    manifest = artifacts.read_manifest(newest)
    if manifest["world_size"] != dist.world_size():
        raise UserError(f"{newest} was written by {manifest['world_size']} ranks, this job has {dist.world_size()}; "
                        "use as many ranks, or delete the stage's .partial folder to start it again")
    engine.load_checkpoint(str(newest), tag=_ENGINE)
    return manifest["step"]


def _signed(folder: Path) -> list[Path]:
    """Oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{artifacts.DONE}"))


def _is_sound(path: Path) -> bool:
    damage = artifacts.damage(path)
    if damage:
        log.warning("checkpoint left out: %s", damage)
    return damage is None
