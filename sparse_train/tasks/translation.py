"""Translation, scored by sacreBLEU.

task.path is one of: a hub data set with a `translation` column (wmt14); a folder with {train,test}.tsv or .jsonl; one
file of pairs, tab- or JSON-separated, also in a .zip, whose split is by source sentence: no test sentence was trained.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sacrebleu

from sparse_train.config import TaskConfig
from sparse_train.errors import UserError
from sparse_train.tasks import read
from sparse_train.tasks.batch import Example
from sparse_train.tasks.task import Task

_NAMES = {"en": "English", "de": "German", "fr": "French", "ro": "Romanian", "es": "Spanish"}


class Translating(Task):
    metric = "bleu"

    def measure(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """bleu (0..100), chrf, and bleu_signature, which says how."""
        found = [sample["prediction"].strip() for sample in samples]
        wanted = [[sample["answer"].strip() for sample in samples]]
        bleu = sacrebleu.BLEU()
        return {"bleu": bleu.corpus_score(found, wanted).score, "chrf": sacrebleu.corpus_chrf(found, wanted).score,
                "bleu_signature": str(bleu.get_signature())}

    def pair(self, source: str, target: str, split: str = "train") -> Example:
        """The paper's prefix, T5's own: "translate English to German: "."""
        names = [_NAMES.get(name, name) for name in self.config.languages]
        default = f"translate {names[0]} to {names[1]}: {{source}}"
        template = (self.config.test_prompt if split == "test" else None) or self.config.prompt or default
        columns = {"source": source, "target": target}
        return Example(read.fill(template, "prompt", **columns),
                       read.fill(self.config.answer or "{target}", "answer", **columns))


class Translation(Translating):
    def __init__(self, config: TaskConfig):
        super().__init__(config)
        path = read.local(config, "a file of pairs, or a folder with {train,test}.tsv or .jsonl")
        if path is None:
            self._splits = {split: [self.pair(*pair, split) for pair in self._hub(split)]
                            for split in ("train", "test")}
        else:
            self._splits = self._read(path)

    def examples(self, split: str, num_examples: int | None = None) -> Sequence[Example]:
        return self._splits[split][:num_examples]

    def _hub(self, split: str) -> list[tuple[str, str]]:
        source, target = self.config.languages
        return read.usable(read.hub_rows(self.config, split), lambda row: (
            read.text_of(row["translation"], source), read.text_of(row["translation"], target)), self.config)

    def _read(self, path: Path) -> dict[str, list[Example]]:
        found = {}
        for split in ("train", "test"):
            file = read.split_file(path, split, "tsv", "jsonl") if path.is_dir() else None
            if file:
                found[split] = [self.pair(*pair, split) for pair in self._pairs(file)]
        if len(found) == 2:
            return found
        if path.is_dir():
            files = [file for file in sorted(path.iterdir()) if file.suffix in (".zip", ".tsv", ".jsonl")]
            if len(files) != 1:
                raise UserError(f"task.path={path} holds neither {{train,test}}.tsv or .jsonl nor one file of pairs")
            path = files[0]
        pairs = read.shuffled(self._pairs(path), "\t".join)
        return {split: [self.pair(*pair, split) for pair in pairs
                        if read.in_test(pair[0], self.config.test_share) == (split == "test")]
                for split in ("train", "test")}

    def _pairs(self, file: Path) -> list[tuple[str, str]]:
        source, target = self.config.languages

        def parse(line: str) -> tuple[str, str]:
            if line.startswith("{"):
                row = read.parse_json(line)
                row = row.get("translation", row)
            else:
                row = dict(zip((source, target), line.split("\t"), strict=False))
            return read.text_of(row, source), read.text_of(row, target)

        return read.usable(read.lines(file), parse, self.config)
