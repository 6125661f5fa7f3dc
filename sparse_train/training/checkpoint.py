"""Checkpoints of a training job: each rank writes what it owns, aside; the whole is signed, then renamed.

    FOLDER/step-00000100/rank-00000.safetensors    KIND/START/NAME: entries START ... of a flattened parameter, fp32
    FOLDER/step-00000100/manifest.json             step, metrics, seconds, sizes, digests of bits and files; then DONE

KIND is master, exp_avg or exp_avg_sq. Ranges, not ranks, are what is stored: another number of ranks, or another ZeRO
stage, reads the ranges it needs. The bits are not in it: they never change in a job and come with the pruned model;
their digests must be the same.
"""

import json
import logging
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from sparse_train import artifacts, dist
from sparse_train.errors import UserError
from sparse_train.sparse import save_file
from sparse_train.training.bits import FrozenBits
from sparse_train.training.fragments import own_fragments, restore

log = logging.getLogger(__name__)


def save(engine: Any, bits: FrozenBits, folder: Path, step: int, metrics: dict[str, Any], num_kept: int,
         require_newest_attempt: Callable[[], None]) -> None:
    """Collective. Keeps the newest `num_kept` checkpoints.

    `metrics`: the last that were logged, for resume to return. `require_newest_attempt` is called on rank 0 before
    anything in `folder` changes; it raises where a newer attempt has taken over.
    """
    started = time.monotonic()
    bits.check()
    final = folder / f"step-{step:08d}"
    partial = final.with_suffix(".partial")
    if dist.rank() == 0:
        require_newest_attempt()
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    file = _own_file(partial)
    save_file({f"{kind}/{fragment.start}/{fragment.name}": tensor.contiguous()
               for fragment in own_fragments(engine) for kind, tensor in fragment.tensors.items()}, file)
    written = dist.gather_objects((file.name, artifacts.digest_file(file)))
    if dist.rank() == 0:
        require_newest_attempt()
        artifacts.publish(partial, final, {
            "step": step, "sizes": _sizes(engine), "bits": bits.digests,
            "metrics": json.dumps(metrics),  # as text: a term of the loss may be infinite
            "seconds": time.monotonic() - started}, files=dict(written))
        kept = _signed(folder)[-num_kept:]
        for old in folder.glob("step-*"):  # unsigned ones, of a job killed in a save, too
            if old not in kept:
                shutil.rmtree(old)
    dist.barrier()


def resume(engine, bits: FrozenBits, folder: Path) -> tuple[int, dict[str, Any]]:
    """Collective. Load the newest sound checkpoint into `engine`; returns its step and metrics, (0, {}) when there is
    none.

    Raises UserError when it is of a model with other parameters or other bits.
    """
    newest = None
    for path in reversed(dist.gather_objects(_signed(folder))[0]):  # rank 0's: listings of shared storage may differ
        if _is_sound(path):
            newest = path
            break
        # Left signed it would count as the newest of those to keep, before every sound one that is written now.
        if dist.rank() == 0:
            (path / artifacts.DONE).unlink()
    dist.barrier()
    if newest is None:
        return 0, {}
    manifest = artifacts.require_manifest(newest)
    _check_same_model(engine, bits, newest, manifest)
    restore(engine, _Reader(newest, manifest["sizes"]).read, manifest["step"])
    return manifest["step"], json.loads(manifest.get("metrics", "{}"))  # {}: of an older release


def _check_same_model(engine, bits: FrozenBits, path: Path, manifest: dict) -> None:
    other = [name for mine, theirs in ((_sizes(engine), manifest["sizes"]), (bits.digests, manifest["bits"]))
             for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
    if other:
        raise UserError(f"{path} was written for another model: {other[0]} differs; delete the stage's .partial folder "
                        "to start it again")


def _sizes(engine) -> dict[str, int]:
    """Entries of each trained parameter."""
    return {name: math.prod(getattr(parameter, "ds_shape", parameter.shape))
            for name, parameter in engine.module.named_parameters() if parameter.requires_grad}


class _Reader:
    """Ranges of the parameters of a checkpoint, put together from whichever files hold them.

    Other files than this rank's own are opened when a range is not in that one: under stage 3, each of a thousand ranks
    shall not open a thousand files to go on as it was.
    """

    def __init__(self, folder: Path, sizes: dict[str, int]):
        self._folder, self._sizes = folder, sizes
        own = _own_file(folder)
        self._held = _ranges([own] if own.is_file() else [])
        self._is_whole = False

    def read(self, kind: str, name: str, start: int, stop: int) -> torch.Tensor:
        if start == stop:  # a parameter has fewer entries than there are ranks
            return torch.empty(0)
        ranges = self._held.get((kind, name), [])
        if not self._is_whole and not any(first <= start and stop <= last for first, last, _ in ranges):
            self._open_all()
            ranges = self._held[kind, name]
        parts = []
        for first, last, file in ranges:
            low, high = max(start, first), min(stop, last)
            if low < high:
                with safe_open(file, "pt") as opened:
                    parts.append(opened.get_slice(f"{kind}/{first}/{name}")[low - first:high - first])
        return torch.cat(parts)

    def _open_all(self) -> None:
        self._held, self._is_whole = _ranges(sorted(self._folder.glob("rank-*.safetensors"))), True
        for (_, name), ranges in self._held.items():
            ranges.sort()
            edges = [0, *(stop for _, stop, _ in ranges)]
            if [start for start, _, _ in ranges] != edges[:-1] or edges[-1] != self._sizes[name]:
                raise UserError(f"{self._folder}: the parts of {name} do not make up its {self._sizes[name]} entries")


def _ranges(files: list[Path]) -> dict[tuple[str, str], list[tuple[int, int, Path]]]:
    """(kind, name) -> (start, stop, file) of each part of it in these files."""
    held: dict[tuple[str, str], list[tuple[int, int, Path]]] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - it is no dict
                kind, start, name = key.split("/", 2)
                stop = int(start) + opened.get_slice(key).get_shape()[0]
                held.setdefault((kind, name), []).append((int(start), stop, file))
    return held


def save_seconds(folder: Path) -> float | None:
    """What the newest signed checkpoint took to write."""
    return artifacts.require_manifest(signed[-1]).get("seconds") if (signed := _signed(folder)) else None


def newest_step(folder: Path) -> int:
    """Of the newest signed checkpoint, 0 when there is none."""
    return int(signed[-1].name.rpartition("-")[2]) if (signed := _signed(folder)) else 0


def _own_file(folder: Path) -> Path:
    return folder / f"rank-{dist.rank():05d}.safetensors"


def _signed(folder: Path) -> list[Path]:
    """Oldest first. One that was signed and not renamed any more does not count."""
    return sorted(path.parent for path in folder.glob(f"step-*/{artifacts.DONE}") if not path.parent.suffix)


def _is_sound(path: Path) -> bool:
    """Collective: the ranks share the work of reading, and the verdict."""
    mine = artifacts.damage(path, dist.share)
    damage = next((found for found in dist.gather_objects(mine) if found), None)
    if damage and dist.rank() == 0:
        log.warning("checkpoint left out: %s", damage)
    return damage is None
