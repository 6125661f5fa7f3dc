"""Translation, scored by sacreBLEU.

task.path is one of: a hub data set with a `translation` column (wmt14), taken in an order that depends on its texts
alone; a folder with {train,test}.tsv or .jsonl; one file of pairs, tab- or JSON-separated, also in a .zip, whose split
is by source sentence: no test sentence was trained.
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
    extra_metrics = ("chrf",)
    score_settings = ("bleu_signature",)
    takes_chat = True

    def measure(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """bleu and chrf (0..100); bleu_signature, which names sacreBLEU's settings and version."""
        predictions = [sample["prediction"].strip() for sample in samples]
        references = [[sample["answer"].strip() for sample in samples]]
        bleu, chrf = sacrebleu.BLEU(), sacrebleu.corpus_chrf(predictions, references)
        return {"bleu": bleu.corpus_score(predictions, references).score, "chrf": chrf.score,
                "bleu_signature": str(bleu.get_signature())}

    def pair(self, source: str, target: str, split: str = "train") -> Example:
        """The paper's prefix, T5's own: "translate English to German: "."""
        names = [_NAMES.get(name, name) for name in self.config.languages]
        default = f"translate {names[0]} to {names[1]}: {{source}}"
        return self.fill_templates(split, (default, "{target}"), {"source": source, "target": target})


class Translation(Translating):
    def __init__(self, config: TaskConfig):
        super().__init__(config)
        self._path = read.local(config, "a file of pairs, or a folder with {train,test}.tsv or .jsonl")

    def read(self, split: str) -> Sequence[Example]:
        path, name = self._path, self.config.split_name(split)
        if path is None:
            return self._hub(split, name)
        if path.is_dir():
            files = {part: read.split_files(path, self.config.split_name(part), "tsv", "jsonl")
                     for part in ("train", "test")}
            if all(files.values()):
                return [self.pair(*pair, split) for file in files[split] for pair in self._pairs(file)]
            single = [file for file in sorted(path.iterdir()) if file.suffix in (".zip", ".tsv", ".jsonl")
                      and not read.is_litter(file.relative_to(path))]
            if len(single) != 1:
                key = self.config.key
                raise UserError(f"{key}.path={path} holds neither {self.config.train_split} and "
                                f"{self.config.test_split}.tsv or .jsonl ({key}.train_split, {key}.test_split) "
                                "nor one file of pairs")
            path = single[0]
        return [self.pair(*pair, split) for pair in read.shuffled(self._pairs(path), "\t".join)
                if read.in_test(pair[0], self.config.test_share) == (split == "test")]

    def _hub(self, split: str, name: str) -> Sequence[Example]:
        rows = read.hub_rows(self.config, name)

        def key(numbered: tuple[int, dict]) -> int:
            index, row = numbered
            return read.text_hash("\t".join(self._columns(row.get("translation")))) << 32 | index

        keys = sorted(read.usable(read.numbered(rows, self.config, name), key, self.config))
        return read.Rows(rows, [key & 0xFFFFFFFF for key in keys],
                         lambda row: self.pair(*self._columns(row["translation"]), split))

    def _pairs(self, file: Path) -> list[tuple[str, str]]:
        def parse(line: str) -> tuple[str, str]:
            if line.startswith("{"):
                row = read.parse_json(line)
                return self._columns(row.get("translation", row))
            return self._columns(dict(zip(self.config.languages, line.split("\t"), strict=False)))

        return read.usable(read.rows(file), parse, self.config)

    def _columns(self, row: Any) -> tuple[str, str]:
        source, target = self.config.languages
        return read.text_of(row, source), read.text_of(row, target)
