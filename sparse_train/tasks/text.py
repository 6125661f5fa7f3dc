"""Plain text: perplexity, and general calibration data.

task.path: a folder with {train,test}.txt or .md (packed .gz or .xz too), a text file, a folder of such files, or a hub
data set with a `text` column. Where the data has no test split, parts of it are in one or the other by their text.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sparse_train.config import TaskConfig
from sparse_train.errors import UserError
from sparse_train.tasks import read
from sparse_train.tasks.batch import Example
from sparse_train.tasks.task import Task

_CHARACTERS_PER_TOKEN = 2  # few, so that hardly a piece is too long for max_length
_BETWEEN = "\n\n"
_UNIT = 2000
"""Characters that are in the same split, whatever max_length is: tasks that read the same data with different lengths
have the same test text."""


class Text(Task):
    metric = "perplexity"
    higher_is_better = False
    generates = False

    def __init__(self, config: TaskConfig):
        super().__init__(config)
        self._path = read.local(config, "a text file or a folder of them")

    def read(self, split: str) -> Sequence[Example]:
        paragraphs, has_splits = self._paragraphs(split)
        if not has_splits:
            units = (unit for unit in _pieces(paragraphs, _UNIT)
                     if read.in_test(unit, self.config.test_share) == (split == "test"))
            paragraphs = itertools.chain.from_iterable(unit.split(_BETWEEN) for unit in units)
        pieces = _pieces(paragraphs, self.config.max_length * _CHARACTERS_PER_TOKEN)
        return [Example("", piece) for piece in read.shuffled(list(pieces), str)]

    def measure(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        return {}

    def _paragraphs(self, split: str) -> tuple[Iterable[str], bool]:
        """(those of the split, True), or (those of all the data, False) where it has no splits."""
        path, config = self._path, self.config
        if path is None:
            rows, has_splits = read.hub_split(config, split)
            return filter(None, read.usable(rows, lambda pair: _text(pair[1]), config)), has_splits
        of_split = {part: read.split_files(path, config.split_name(part), "txt", "md") for part in ("train", "test")}
        has_splits = all(of_split.values())
        if has_splits:
            files = of_split[split]
        elif path.is_file():
            files = [path]
        else:
            files = [file for file in sorted(path.rglob("*")) if {".txt", ".md"} & set(file.suffixes)
                     and file.is_file() and not read.is_litter(file.relative_to(path))]
        for file in files:
            if file != path and not file.resolve().is_relative_to(path.resolve()):
                raise UserError(f"{file} is a link out of {self.config.key}.path={path}; put a copy there, or take it "
                                "away")
        return itertools.chain.from_iterable(map(_file_paragraphs, files)), has_splits


def _pieces(paragraphs: Iterable[str], size: int) -> Iterator[str]:
    """Paragraphs joined up to `size` characters; longer ones are cut."""
    piece = ""
    for paragraph in paragraphs:
        if piece and len(piece) + len(_BETWEEN) + len(paragraph) > size:
            yield piece
            piece = ""
        piece = f"{piece}{_BETWEEN}{paragraph}" if piece else paragraph
        starts = range(0, len(piece) - size, size)  # the rest is cut once, so that a long line costs linear time
        yield from (piece[start:start + size] for start in starts)
        piece = piece[len(starts) * size:]
    if piece:
        yield piece


def _text(row: dict) -> str:
    """May be empty: data sets of lines have blank ones between paragraphs."""
    value = row.get("text")
    if not isinstance(value, str):
        raise read.Unusable("no text in column 'text'")
    return value.strip()


def _file_paragraphs(file: Path) -> Iterator[str]:
    paragraph: list[str] = []
    for _, line in read.lines(file):
        if line.strip():
            paragraph.append(line.strip())
        elif paragraph:
            yield " ".join(paragraph)
            paragraph = []
    if paragraph:
        yield " ".join(paragraph)
