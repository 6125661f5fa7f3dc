"""Files of a run: written under a temporary name, signed, then renamed.

    runs/demo/config.yaml               the resolved config
    runs/demo/dense.partial/            a running stage (training keeps its checkpoints here and resumes from them)
    runs/demo/dense/                    a finished stage, renamed from .partial
             ... its files
             manifest.json              sources, config, versions, host, seconds, metrics, and every file's sha256
             DONE                       empty; written last: without it the folder does not count
    runs/demo/.dense.replaced/          the earlier result, while a new one takes its place

`sources` is what a stage's result depends on (the values of the config that it reads, its inputs' digests): a finished
stage with the same sources is not run again. A folder is replaced only by the stage that its manifest names.
"""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from sparse_train.errors import UserError

MANIFEST, DONE, SOURCES = "manifest.json", "DONE", "sources.json"
_PACKAGES = ("sparse-train", "torch", "deepspeed", "transformers", "safetensors", "submitit")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically: a reader sees the old file or the new one."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError:  # such as a full disk
        aside.unlink(missing_ok=True)
        raise


def write_json(path: Path, data: Any) -> None:
    """As write_text. Raises ValueError for NaN and infinity, which JSON does not have."""
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A name beside `path`, for a file or a folder, which becomes `path` at the end, and is deleted after an error.

    Raises UserError where something is at `path` already.
    """
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} exists, and is left as it is; give a path where there is nothing")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield aside
        os.rename(aside, path)
    except BaseException:
        clear(aside.parent, (aside.name,))
        raise


def parse_json(text: str) -> Any:
    """Plain data of JSON. Raises ValueError, also where it is nested too deeply for Python's parser."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its values are nested too deeply") from error


def read_json(path: Path) -> Any:
    """Plain data of a JSON file. Raises UserError where it cannot be read."""
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def digest(data: Any) -> str:
    """sha256 of plain data (through canonical JSON)."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()


def digest_file(path: Path) -> dict[str, Any]:
    """{"sha256", "bytes"} of a file."""
    with open(path, "rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def _files(folder: Path) -> list[str]:
    """Relative paths of the files below `folder`, without manifest, DONE and the temporary files of write_text."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*")
                   if path.is_file() and not path.name.startswith("."))
    return [name for name in names if name not in (MANIFEST, DONE)]


def sign(folder: Path, manifest: dict[str, Any], files: dict[str, dict] | None = None) -> None:
    """Write `manifest` with the digests of all files, then DONE. `files`: the digests, where they are known already."""
    files = files or {name: digest_file(folder / name) for name in _files(folder)}
    write_json(folder / MANIFEST, {**manifest, "versions": _versions(), "host": platform.node(), "files": files})
    (folder / DONE).touch()


def publish(partial: Path, final: Path, manifest: dict[str, Any], scratch: tuple[str, ...] = (),
            files: dict[str, dict] | None = None) -> None:
    """Sign a finished `partial` folder and rename it to `final`; an earlier result there is deleted afterwards.

    The files and folders named in `scratch` are left unsigned and deleted only after the rename, so that a process
    which is killed before it finds them intact when it resumes. Raises UserError where `final` is not a result of the
    manifest's stage.
    """
    if files is None:
        files = {name: digest_file(partial / name) for name in _files(partial) if Path(name).parts[0] not in scratch}
    require_own(final, manifest.get("stage"))
    sign(partial, manifest, files)
    aside = _aside(final)
    if final.exists():
        _remove(aside)
        os.rename(final, aside)
    os.rename(partial, final)
    _remove(aside)
    clear(final, scratch)


def heal(final: Path) -> None:
    """Finish a publish() that was interrupted: restore the earlier result where the new one was not renamed yet, else
    delete it."""
    aside = _aside(final)
    if aside.is_dir() and not final.exists():
        os.rename(aside, final)
    _remove(aside)


def _aside(final: Path) -> Path:
    return final.with_name(f".{final.name}.replaced")


def _remove(aside: Path) -> None:
    (aside / DONE).unlink(missing_ok=True)  # first, so that a half-deleted result does not count as one
    shutil.rmtree(aside, ignore_errors=True)


def require_own(folder: Path, stage: str | None) -> None:
    """Raises UserError where `folder` is a link or holds files, and was not written by `stage` of a run."""
    remedy = "it is left as it is; move it away, or give another name"
    if folder.is_symlink():
        raise UserError(f"{folder} is a link to {os.readlink(folder)}, which this run did not make; {remedy}")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if folder.suffix == ".partial":
        is_of_stage = (folder / SOURCES).is_file() or all(path.name.startswith(".") for path in folder.iterdir())
    else:
        manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else None
        is_of_stage = isinstance(manifest, dict) and manifest.get("stage") == stage
    if not is_of_stage:
        raise UserError(f"{folder} was not made by stage {stage} of a run, or by an older release; {remedy}")


def clear(folder: Path, names: tuple[str, ...]) -> None:
    """Delete the files and folders in `folder` that `names` lists, where they exist."""
    for path in map(folder.joinpath, names):
        if path.is_file() or path.is_symlink():
            path.unlink()
        else:
            shutil.rmtree(path, ignore_errors=True)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a signed folder, None when it is not signed. Raises UserError where it is broken.

    An earlier result that was moved aside counts as long as the new one is not in place (see heal).
    """
    if not folder.exists():
        folder = _aside(folder)
    if not (folder / DONE).is_file():
        return None
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        raise UserError(f"cannot read {folder / MANIFEST}: it is not a manifest; delete {folder}")
    return manifest


def stage_of(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """(folder, manifest) of the stage of a run that made a model folder, None where none did. The models of the stage
    compress are folders inside the stage's."""
    for stage in (folder, folder.parent):
        manifest = read_manifest(stage)
        if manifest is not None and "stage" in manifest:
            return stage, manifest
    return None


def require_manifest(folder: Path) -> dict[str, Any]:
    """As read_manifest, but raises UserError where the folder is not signed."""
    if (manifest := read_manifest(folder)) is None:
        raise UserError(f"{folder} is not signed; run the stage that makes it again")
    return manifest


def damage(folder: Path, share: Callable[[list[str]], list[str]] = lambda names: names) -> str | None:
    """What is wrong with a signed folder's files (one line), None when each has its recorded digest.

    `share` picks the files to check, for ranks that divide the work.
    """
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        return str(error)
    if manifest is None:
        return f"{folder} is not signed"
    recorded, present = manifest["files"], set(_files(folder))
    for name in share(sorted(recorded)):
        if name not in present:
            return f"{folder / name} is missing"
        if recorded[name] != digest_file(folder / name):
            return f"{folder / name} is not the file that was signed"
    return None


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in _PACKAGES}}
