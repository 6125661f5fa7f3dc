"""Rows from outside: files, archives, the hub. What cannot be used is counted and named, and too much of it an error.

Nothing is unpickled or executed: text, JSON, audio bytes.
"""

import gzip
import hashlib
import io
import json
import logging
import lzma
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sparse_train.config import TaskConfig
from sparse_train.errors import UserError

log = logging.getLogger(__name__)
_NAMED = 3
T = TypeVar("T")
_OPEN = {".gz": gzip.open, ".xz": lzma.open}


class Unusable(ValueError):
    """A row that cannot become an example; the text says why."""


def usable(rows: Iterable[tuple[str, Any]], make: Callable[[Any], T], config: TaskConfig) -> list[T]:
    """`make(row)` of each (place, row), those left out that raise Unusable. Raises UserError above max_bad_share."""
    found, bad, total = [], [], 0
    for place, row in rows:
        total += 1
        try:
            found.append(make(row))
        except Unusable as error:
            bad.append(f"{place}: {error}")
    named = "; ".join(bad[:_NAMED]) + ("; ..." if len(bad) > _NAMED else "")
    if not total:
        raise UserError(f"task.path={config.path} holds no rows")
    if len(bad) > config.max_bad_share * total:
        raise UserError(f"task.path={config.path}: {len(bad)} of {total} rows cannot be used, more than "
                        f"task.max_bad_share={config.max_bad_share:g}: {named}")
    if bad:
        log.warning("%s: %d of %d rows left out: %s", config.path, len(bad), total, named)
    return found


def in_test(text: str, share: float) -> bool:
    """The split of a text depends on it alone: equal texts are never on both sides."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) < share * 2**64


def shuffled(examples: Sequence[T], key: Callable[[T], str]) -> list[T]:
    """In an order that depends on the texts alone, so that the first hundred are like the rest."""
    return sorted(examples, key=lambda example: hashlib.sha256(key(example).encode()).digest())


def local(config: TaskConfig, what: str) -> Path | None:
    """task.path where it is a file or folder, None where it is to be asked of the hub. Raises UserError."""
    if config.path is None:
        raise UserError(f"task.path is missing; task {config.name} needs {what}, or a hub name")
    path = Path(config.path)
    if path.exists():
        return path
    if config.path.startswith((".", "/", "~")) or config.path.count("/") > 1:
        raise UserError(f"task.path={config.path}: there is no such file or folder")
    return None


def hub_rows(config: TaskConfig, split: str, subset: str | None = None, undecoded: str | None = None
             ) -> Iterator[tuple[str, Any]]:
    """(place, row) of a hub data set; `undecoded`: an audio column to leave as bytes."""
    import datasets

    try:
        rows = datasets.load_dataset(config.path, subset or config.subset, split=split)
        if undecoded:
            rows = rows.cast_column(undecoded, datasets.Audio(decode=False))
    except Exception as error:  # datasets raises many kinds; each means that the name cannot be had
        line = str(error).strip().split("\n")[0]
        raise UserError(f"task.path={config.path} is no file or folder, and no data set that can be loaded: "
                        f"{line}") from error
    return ((f"{config.path} {split} {index}", row) for index, row in enumerate(rows))


def split_file(folder: Path, split: str, *endings: str) -> Path | None:
    """folder/split.ENDING, packed or not."""
    for ending in endings:
        for packed in ("", *_OPEN):
            if (file := folder / f"{split}.{ending}{packed}").is_file():
                return file
    return None


def lines(file: Path, encoding: str = "utf-8") -> Iterator[tuple[str, str]]:
    """(place, line) of a text file, plain, .gz or .xz, or of the one .txt, .tsv or .jsonl of a .zip."""
    try:
        if file.suffix == ".zip":
            with zipfile.ZipFile(file) as archive:
                names = [name for name in archive.namelist()
                         if name.endswith((".txt", ".tsv", ".jsonl")) and not Path(name).name.startswith("_")]
                if len(names) != 1:
                    raise UserError(f"{file} holds {len(names)} text files; it must be one .txt, .tsv or .jsonl")
                with io.TextIOWrapper(archive.open(names[0]), encoding) as opened:
                    yield from ((f"{file}/{names[0]} line {number}", line.rstrip("\n"))
                                for number, line in enumerate(opened, 1))
        else:
            with _OPEN.get(file.suffix, open)(file, "rt", encoding=encoding) as opened:
                yield from ((f"{file} line {number}", line.rstrip("\n")) for number, line in enumerate(opened, 1))
    except (OSError, EOFError, UnicodeDecodeError, zipfile.BadZipFile, lzma.LZMAError) as error:
        raise UserError(f"cannot read {file}: {error}") from error


def parse_json(line: str) -> dict:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise Unusable("no JSON") from error
    if not isinstance(row, dict):
        raise Unusable("no JSON object")
    return row


def text_of(row: dict, column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str):
        raise Unusable(f"no text in column {column!r}")
    if not value.strip():
        raise Unusable(f"column {column!r} is empty")
    return value


def fill(template: str, key: str, **columns: str) -> str:
    """`template` with {column} replaced. Raises UserError for a name that is not there."""
    try:
        return template.format(**columns)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"task.{key}={template!r}: {error} is no column; use "
                        f"{', '.join('{' + name + '}' for name in columns)}") from error
