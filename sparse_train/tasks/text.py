"""Plain text: perplexity, and general calibration data.

task.path: a text file (.txt, .md, packed .gz or .xz), a folder of such files, or a hub data set with a `text` column.
Pieces are split into training and test by their text.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from sparse_train.config import TaskConfig
from sparse_train.errors import UserError
from sparse_train.tasks import read
from sparse_train.tasks.batch import Example
from sparse_train.tasks.task import Task

_CHARACTERS_PER_TOKEN = 2  # few, so that hardly a piece is too long for max_length


class Text(Task):
    metric = "perplexity"
    best = min
    generates = False

    def __init__(self, config: TaskConfig):
        super().__init__(config)
        pieces = read.shuffled(list(self._pieces()), str)
        if not pieces:
            raise UserError(f"task.path={config.path} holds no text")
        self._splits = {split: [Example("", piece) for piece in pieces
                                if read.in_test(piece, config.test_share) == (split == "test")]
                        for split in ("train", "test")}

    def examples(self, split: str, num_examples: int | None = None) -> Sequence[Example]:
        return self._splits[split][:num_examples]

    def measure(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        return {}

    def _pieces(self) -> Iterator[str]:
        """Paragraphs joined up to a length; longer ones are cut."""
        largest, held = self.config.max_length * _CHARACTERS_PER_TOKEN, ""
        for paragraph in self._paragraphs():
            if held and len(held) + len(paragraph) + 2 > largest:
                yield held
                held = ""
            held = f"{held}\n\n{paragraph}" if held else paragraph
            while len(held) > largest:
                yield held[:largest]
                held = held[largest:]
        if held:
            yield held

    def _paragraphs(self) -> Iterator[str]:
        path = read.local(self.config, "a text file or a folder of them")
        if path is None:
            yield from read.usable(read.hub_rows(self.config, "train"), lambda row: read.text_of(row, "text"),
                                   self.config)
            return
        files = [path] if path.is_file() else [file for file in sorted(path.rglob("*"))
                                               if {".txt", ".md"} & set(file.suffixes)]
        for file in files:
            held: list[str] = []
            for _, line in read.lines(file):
                if line.strip():
                    held.append(line.strip())
                elif held:
                    yield " ".join(held)
                    held = []
            if held:
                yield " ".join(held)
