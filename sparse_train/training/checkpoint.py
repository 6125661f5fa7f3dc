"""Checkpoints of a training job: each rank writes its shards into a temporary folder, which is signed, then renamed.

    FOLDER/step-00000100/rank-00000.safetensors    KIND/START/NAME: entries START ... of a flattened parameter, fp32
    FOLDER/step-00000100/manifest.json             step, metrics, seconds, sizes, digests of bits and files; then DONE

KIND is master, exp_avg or exp_avg_sq. Tensors are stored by range rather than by rank, so that another number of ranks,
or another ZeRO stage, reads the ranges that it needs. The bits are not stored: they never change in a job and come with
the pruned model, whose digests must be equal.
"""

import json
import logging
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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
    """Collective. Save a checkpoint; the newest `num_kept` stay, older ones are deleted.

    `metrics`: the last line that was logged, which resume returns. `require_newest_attempt` is called on rank 0 before
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
    file = _file_of_this_rank(partial)
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
        for old in folder.glob("step-*"):  # also unsigned ones, of a job that was killed while it saved
            if old not in kept:
                shutil.rmtree(old)
    dist.barrier()


def resume(engine: Any, bits: FrozenBits, folder: Path) -> tuple[int, dict[str, Any]]:
    """Collective. Load the newest undamaged checkpoint into `engine`; returns its step and metrics, or (0, {}) without
    one.

    Raises UserError when it is of a model with other parameters or other bits.
    """
    newest = None
    for path in reversed(dist.from_rank_0(_signed(folder))):  # listings of shared storage may differ
        if _is_intact(path):
            newest = path
            break
        # While signed it would count among the newest to keep, ahead of the intact ones that are written from now on.
        if dist.rank() == 0:
            (path / artifacts.DONE).unlink()
    dist.barrier()
    if newest is None:
        return 0, {}
    manifest = artifacts.require_manifest(newest)
    _check_same_model(engine, bits, newest, manifest)
    restore(engine, _Reader(newest, manifest["sizes"]).read, manifest["step"])
    return manifest["step"], json.loads(manifest.get("metrics", "{}"))  # {}: of an older release


def _check_same_model(engine: Any, bits: FrozenBits, path: Path, manifest: dict[str, Any]) -> None:
    differing = [name for mine, theirs in ((_sizes(engine), manifest["sizes"]), (bits.digests, manifest["bits"]))
                 for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
    if differing:
        raise UserError(f"{path} was written for another model: {differing[0]} differs; delete the stage's .partial "
                        "folder to start it again")


def _sizes(engine: Any) -> dict[str, int]:
    """Number of entries of each trained parameter."""
    return {name: math.prod(getattr(parameter, "ds_shape", parameter.shape))
            for name, parameter in engine.module.named_parameters() if parameter.requires_grad}


class _Part(NamedTuple):
    """Entries start..stop-1 of a flattened parameter, in a file."""

    start: int
    stop: int
    file: Path


class _Reader:
    """Reads ranges of the parameters of a checkpoint, assembled from the files that hold them.

    The other ranks' files are opened only for a range that is not in this rank's file: under stage 3, a thousand ranks
    that resume unchanged should not open a thousand files each.
    """

    def __init__(self, folder: Path, sizes: dict[str, int]):
        self._folder, self._sizes = folder, sizes
        file = _file_of_this_rank(folder)
        self._parts = _list_parts([file] if file.is_file() else [])
        self._is_whole = False

    def read(self, kind: str, name: str, start: int, stop: int) -> torch.Tensor:
        if start == stop:  # a parameter has fewer entries than there are ranks
            return torch.empty(0)
        parts = self._parts.get((kind, name), [])
        if not self._is_whole and not any(part.start <= start and stop <= part.stop for part in parts):
            self._open_all()
            parts = self._parts[kind, name]
        tensors = []
        for part in parts:
            low, high = max(start, part.start), min(stop, part.stop)
            if low < high:
                with safe_open(part.file, "pt") as opened:
                    view = opened.get_slice(f"{kind}/{part.start}/{name}")
                    tensors.append(view[low - part.start:high - part.start])
        return torch.cat(tensors)

    def _open_all(self) -> None:
        self._parts, self._is_whole = _list_parts(sorted(self._folder.glob("rank-*.safetensors"))), True
        for (_, name), parts in self._parts.items():
            parts.sort()
            edges = [0, *(part.stop for part in parts)]
            if [part.start for part in parts] != edges[:-1] or edges[-1] != self._sizes[name]:
                raise UserError(f"{self._folder}: the parts of {name} do not make up its {self._sizes[name]} entries")


def _list_parts(files: list[Path]) -> dict[tuple[str, str], list[_Part]]:
    """The parts in these files by (kind, parameter's name)."""
    parts: dict[tuple[str, str], list[_Part]] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - it is not a dict
                kind, start, name = key.split("/", 2)
                stop = int(start) + opened.get_slice(key).get_shape()[0]
                parts.setdefault((kind, name), []).append(_Part(int(start), stop, file))
    return parts


def save_seconds(folder: Path) -> float | None:
    """Seconds that the newest signed checkpoint took to write, None when there is none."""
    signed = _signed(folder)
    return artifacts.require_manifest(signed[-1]).get("seconds") if signed else None


def newest_step(folder: Path) -> int:
    """Of the newest signed checkpoint, 0 when there is none."""
    signed = _signed(folder)
    return int(signed[-1].name.rpartition("-")[2]) if signed else 0


def _file_of_this_rank(folder: Path) -> Path:
    return folder / f"rank-{dist.rank():05d}.safetensors"


def _signed(folder: Path) -> list[Path]:
    """Signed checkpoints, oldest first; one that was signed but not renamed does not count."""
    return sorted(path.parent for path in folder.glob(f"step-*/{artifacts.DONE}") if not path.parent.suffix)


def _is_intact(path: Path) -> bool:
    """Collective. The ranks divide the files among them; the result is the same on all."""
    damage = next(filter(None, dist.gather_objects(artifacts.damage(path, dist.share))), None)
    if damage and dist.rank() == 0:
        log.warning("checkpoint skipped: %s", damage)
    return damage is None
