"""Rows from outside: files, archives, the hub. Unusable rows are counted and named; too many of them are an error.

Nothing is unpickled or executed: text, JSON, audio bytes.
"""

import contextlib
import gzip
import hashlib
import io
import itertools
import logging
import lzma
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any, TypeVar, cast

import numpy as np

from sparse_train import artifacts
from sparse_train.config import TaskConfig
from sparse_train.errors import UserError, first_line
from sparse_train.hub import hub_answers, may_be_hub_name

log = logging.getLogger(__name__)
_NAMED = 3
_LONGEST_ROW = 2**24
# Text and JSON shrink to a tenth or a fiftieth; what unpacks to more than this was made to fill the memory.
_UNPACKED, _UNPACKED_PER_BYTE = 2**26, 250
T = TypeVar("T")
_OPEN: dict[str, Callable[[Any], Any]] = {".gz": gzip.open, ".xz": lzma.open}
# All that reading a damaged file or archive raises.
DAMAGED = (OSError, EOFError, UnicodeDecodeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, NotImplementedError,
           RuntimeError)


class Unusable(ValueError):
    """A row that cannot become an example; the text says why."""


class Rows(Sequence):
    """make(rows[i]) for i in `order`, made when asked for: millions of examples need no memory."""

    def __init__(self, rows: Sequence, order: Sequence[int] | np.ndarray, make: Callable[[Any], Any] = lambda row: row):
        self._rows, self._order, self._make = rows, np.asarray(order, dtype=np.int64), make

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Rows(self._rows, self._order[index], self._make)
        return self._make(self._rows[int(self._order[index])])


def usable(rows: Iterable[tuple[str, Any]], make: Callable[[Any], T], config: TaskConfig) -> list[T]:
    """`make(row)` of each (place, row), those left out that raise Unusable. Raises UserError above max_bad_share."""
    examples: list[T] = []
    bad: list[str] = []
    total = 0
    for place, row in rows:
        total += 1
        try:
            examples.append(make(row))
        except Unusable as error:
            if len(bad) <= _NAMED:
                bad.append(f"{place}: {error}")
    num_bad = total - len(examples)
    if num_bad > config.max_bad_share * total:
        raise UserError(f"{config.key}.path={config.path}: {num_bad} of {total} rows cannot be used, more than "
                        f"{config.key}.max_bad_share={config.max_bad_share:g}: {some(bad)}")
    if bad:
        log.warning("%s: %d of %d rows left out: %s", config.path, num_bad, total, some(bad))
    return examples


def some(named: Sequence[str]) -> str:
    return "; ".join(named[:_NAMED]) + ("; ..." if len(named) > _NAMED else "")


def in_test(text: str, share: float) -> bool:
    """The split of a text depends on it alone: equal texts are never on both sides."""
    return text_hash(text) < share * 2**64


def text_hash(text: str) -> int:
    """64 bits."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def shuffled(examples: Sequence[T], key: Callable[[T], str]) -> list[T]:
    """In an order that depends on the texts alone, so that the first hundred are like the rest."""
    return sorted(examples, key=lambda example: text_hash(key(example)))


def local(config: TaskConfig, what: str) -> Path | None:
    """task.path where it is a file or folder, None where it may be a name on the hub. Raises UserError."""
    if config.path is None:
        raise UserError(f"{config.key}.path is missing; task {config.name} needs {what}, or a hub name")
    path = Path(config.path)
    if path.exists():
        return path
    if not may_be_hub_name(config.path):
        raise UserError(f"{config.key}.path={config.path}: there is no such file or folder")
    return None


def hub_rows(config: TaskConfig, split: str, subset: str | None = None, undecoded: str | None = None) -> Sequence[dict]:
    """Rows of a hub data set, which stay on disk. The audio column `undecoded` stays encoded bytes."""
    import datasets

    with _hub_errors(config):
        rows = datasets.load_dataset(config.path, subset or config.subset, split=split)
        return rows.cast_column(undecoded, datasets.Audio(decode=False)) if undecoded else rows


def hub_split(config: TaskConfig, split: str) -> tuple[Iterator[tuple[str, tuple[int, dict]]], bool]:
    """(numbered rows of "train" or "test", True), or (those of task.train_split, False) where no split is for tests."""
    import datasets

    with _hub_errors(config):
        names = datasets.get_dataset_split_names(config.path, config.subset)
    has_splits = set(config.test_split.split("+")) <= set(names)
    name = config.split_name(split) if has_splits else config.train_split
    return numbered(hub_rows(config, name), config, name), has_splits


@contextlib.contextmanager
def _hub_errors(config: TaskConfig) -> Iterator[None]:
    answers = hub_answers()
    try:
        yield
    except Exception as error:  # datasets raises many kinds; each means that the data cannot be had
        cause: BaseException = error
        while cause.__cause__ is not None:  # "an error occurred" around what did
            cause = cause.__cause__
        is_cut_off = not answers and isinstance(cause, ConnectionError)
        line = "the hub does not answer, and its cache does not hold it" if is_cut_off else first_line(cause)
        raise UserError(f"{config.key}.path={config.path} is no file or folder, and no data set that can be loaded: "
                        f"{line}") from error


def numbered(rows: Iterable[dict], config: TaskConfig, split: str) -> Iterator[tuple[str, tuple[int, dict]]]:
    """(place, (index, row)) of hub rows."""
    return ((f"{config.path} {split} {index}", (index, row)) for index, row in enumerate(rows))


def split_files(folder: Path | zipfile.Path, name: str, *endings: str) -> list[Any]:
    """folder/SPLIT.ENDING, packed or not, of each split that `name` joins by +; none where one of them is missing.

    They are of the type of `folder`."""
    files = []
    for split in name.split("+"):
        candidates = [folder / f"{split}.{ending}{packed}" for ending in endings for packed in ("", *_OPEN)]
        files += [file for file in candidates if file.is_file()][:1]
    return files if len(files) == len(name.split("+")) else []


def rows(file: Path | zipfile.Path) -> Iterator[tuple[str, str]]:
    """(place, line) of a file with a row per line; blank lines, such as a last one, are skipped."""
    return ((place, line) for place, line in lines(file, _LONGEST_ROW) if line.strip(" "))


def lines(file: Path | zipfile.Path, longest: int = sys.maxsize) -> Iterator[tuple[str, str]]:
    """(place, line) of a text file, plain, .gz or .xz, or of the one .txt, .tsv or .jsonl of a .zip.

    Raises UserError for a line of more than `longest` characters and for what unpacks to far more than text does.
    """
    try:
        if isinstance(file, Path) and file.suffix == ".zip":
            file = _only_text(file)
        remaining = _UNPACKED + _UNPACKED_PER_BYTE * _stored_size(file)
        # The mark that some editors put in front of UTF-8 is not part of the first column.
        with (file.open("rb") as stored, _OPEN.get(file.suffix, contextlib.nullcontext)(stored) as unpacked,
              io.TextIOWrapper(unpacked, "utf-8-sig") as opened):
            for number in itertools.count(1):
                line = opened.readline(min(longest, remaining) + 2)
                if not line:
                    return
                remaining -= len(line)
                if remaining < 0:
                    raise UserError(f"{file} unpacks to more than {_UNPACKED_PER_BYTE} times its size, which text does "
                                    "not; unpack it yourself if it is what you want to train on")
                line = line.rstrip("\n")
                if len(line) > longest:
                    raise UserError(f"{file} line {number} has more than {longest:,} characters; a row is one line")
                yield f"{file} line {number}", line
    except DAMAGED as error:
        raise UserError(f"cannot read {file}: {error}") from error


def _only_text(file: Path) -> zipfile.Path:
    archive = zipfile.ZipFile(file)
    names = [name for name in archive.namelist() if name.endswith((".txt", ".tsv", ".jsonl"))
             and not is_litter(PurePath(name)) and not PurePath(name).name.startswith("_")]
    if len(names) != 1:
        raise UserError(f"{file} holds {len(names)} text files; it must be one .txt, .tsv or .jsonl")
    return zipfile.Path(archive, names[0])


def _stored_size(file: Path | zipfile.Path) -> int:
    return file.stat().st_size if isinstance(file, Path) else _archive(file).getinfo(file.at).compress_size


def unpacked_size(file: Path | zipfile.Path) -> int:
    return file.stat().st_size if isinstance(file, Path) else _archive(file).getinfo(file.at).file_size


def _archive(file: zipfile.Path) -> zipfile.ZipFile:
    return cast(zipfile.ZipFile, file.root)  # typeshed has a class of zipfile's own


def is_litter(path: PurePath) -> bool:
    """Files that systems and editors leave beside data: dot files and __MACOSX. `path` is relative to the data's
    folder."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def parse_json(line: str) -> dict:
    try:
        row = artifacts.parse_json(line)
    except ValueError as error:
        raise Unusable("no JSON") from error
    if not isinstance(row, dict):
        raise Unusable("no JSON object")
    return row


def text_of(row: Any, column: str) -> str:
    value = row.get(column) if isinstance(row, dict) else None
    if not isinstance(value, str):
        raise Unusable(f"no text in column {column!r}")
    if not value.strip():
        raise Unusable(f"column {column!r} is empty")
    if not is_unicode(value):
        raise Unusable(f"column {column!r} has half of a surrogate pair in it, which is no character")
    return value


def is_unicode(text: str) -> bool:
    """False where a lone surrogate is in it, which JSON and the command line can produce and no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def fill(template: str, key: str, columns: dict[str, str]) -> str:
    """`template`, the config's `key`, with {column} replaced. Raises UserError for a name that is not there."""
    if not is_unicode(template):
        raise UserError(f"{key}={template!r} has half of a surrogate pair in it, which is no character; spell "
                        "characters themselves, or as \\UXXXXXXXX")
    try:
        return template.format(**columns)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise UserError(f"{key}={template!r}: {error} is no column; use "
                        f"{', '.join('{' + name + '}' for name in columns)}") from error
