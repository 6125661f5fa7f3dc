"""Packed weights that processes share: the first one to load a folder writes them to a file, and all map that file.

    sparse-train/packed/users/ID/NAME-DIGEST/   where huggingface_hub lets libraries keep files (below HF_HOME)
        blocks                                  PackedMatrix.block of each weight, one after the other
        manifest.json, DONE                     as in artifacts.py

The folder of a user is readable by that user alone, so nobody else decides what kernels read. A folder of weights has
one entry, which is replaced when its files change, and deleted when an entry is written after the folder is gone.
"""

import contextlib
import hashlib
import logging
import mmap
import os
import shutil
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

from filelock import FileLock
from huggingface_hub import cached_assets_path

from sparse_train import artifacts
from sparse_train.errors import UserError, first_line
from sparse_train.kernels import PackedMatrix

log = logging.getLogger(__name__)

_LAYOUT = 1
"""To be raised when a block changes, or what is packed of a folder: earlier entries are then no longer used."""
_LEAST_BYTES = 1 << 24
"""Of a folder's tensors; fewer are packed in a moment."""
_FILE = "blocks"


def pack_shared(folder: Path, names: Sequence[str], pack: Callable[[str], PackedMatrix]) -> dict[str, PackedMatrix]:
    """`pack` of each name, over memory that all processes of this user share where that can be had: it takes a cache
    that can be written, and a folder large enough. A file that is not what was written is made again."""
    files = [(file.name, file.stat()) for file in sorted(folder.glob("*.safetensors"))]
    if names and sum(stats.st_size for _, stats in files) >= _LEAST_BYTES:
        version = artifacts.digest([_LAYOUT, list(names), [
            (name, stats.st_size, stats.st_mtime_ns, stats.st_ino) for name, stats in files]])
        try:
            place = _place()
            entry = place / f"{folder.name}-{artifacts.digest(str(folder.resolve()))[:12]}"
            if (found := _map(entry, version)) is None:
                with FileLock(place / "lock"):
                    if (found := _map(entry, version)) is None:
                        _clear(place)
                        _write(entry, {"stage": "packed", "version": version, "folder": str(folder.resolve())}, names,
                               pack)
                        found = _map(entry, version)
            if found is None:
                raise OSError(f"{entry} is not what was written to it")
            return found
        except UserError:  # of the weights
            raise
        except (OSError, ValueError) as error:
            log.warning("%s: its weights take memory in this process alone, since they cannot be shared: %s", folder,
                        first_line(error))
    return {name: pack(name) for name in names}


def _place() -> Path:
    """This user's folder. Raises OSError where it is another's, or others may write to it."""
    place = cached_assets_path("sparse-train", "packed", "users") / str(os.geteuid())
    place.mkdir(mode=0o700, exist_ok=True)
    status = place.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise PermissionError(f"{place} is not a folder that this user alone can write to")
    return place


def _map(entry: Path, version: str) -> dict[str, PackedMatrix] | None:
    """None where there is no entry of this version, or it is damaged."""
    try:
        manifest = artifacts.read_manifest(entry)
        if manifest is None or manifest.get("version") != version:
            return None
        with open(entry / _FILE, "rb") as file:
            memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    except (OSError, ValueError):
        return None
    with contextlib.suppress(OSError):  # large pages, where the file system has them
        memory.madvise(mmap.MADV_HUGEPAGE)
    if hashlib.sha256(memory).hexdigest() != manifest["files"][_FILE]["sha256"]:
        return None
    return {name: PackedMatrix.from_block(memoryview(memory)[start:end])
            for name, (start, end) in manifest["blocks"].items()}


def _write(entry: Path, manifest: dict[str, object], names: Sequence[str],
           pack: Callable[[str], PackedMatrix]) -> None:
    partial = entry.with_name(f"{entry.name}.partial")
    artifacts.clear(entry.parent, (entry.name, partial.name))
    partial.mkdir()
    try:
        digest, blocks, end = hashlib.sha256(), {}, 0
        with open(partial / _FILE, "wb") as file:
            for name in names:
                packed = pack(name)
                file.write(packed.block)
                digest.update(packed.block)
                blocks[name] = [end, end + packed.block.nbytes]
                end += packed.block.nbytes
        artifacts.publish(partial, entry, manifest | {"blocks": blocks},
                          files={_FILE: {"sha256": digest.hexdigest(), "bytes": end}})
        log.warning("%s: its packed weights (%.0f MB) are kept in %s, for all processes", manifest["folder"],
                    end / 1e6, entry)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _clear(place: Path) -> None:
    """Delete the entries of folders that are gone."""
    for entry in place.iterdir():
        with contextlib.suppress(UserError):
            manifest = artifacts.read_manifest(entry)
            if manifest is not None and not Path(str(manifest.get("folder"))).exists():
                shutil.rmtree(entry, ignore_errors=True)
