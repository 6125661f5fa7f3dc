"""GSM8K (Cobbe et al., arXiv 2110.14168): question / answer lines, from a folder or the hub."""

import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparse_train.config import TaskConfig
from sparse_train.errors import UserError
from sparse_train.tasks.batch import Example
from sparse_train.tasks.task import Task

# GSM8K's own rule, as in lm-evaluation-harness "strict-match"; "flexible" takes the last number of the text.
_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_NUMBER = re.compile(r"-?[0-9][0-9.,]*")


class WordProblems(Task):
    """Questions with a number as their answer."""

    metric = "exact_match"

    def measure(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """exact_match (the number after ####), exact_match_flexible (the last number)."""
        flexible = 0
        for sample in samples:
            wanted = final_number(sample["answer"])
            sample["correct"] = final_number(sample["prediction"]) == wanted
            flexible += last_number(sample["prediction"]) == wanted
        return {"exact_match": sum(sample["correct"] for sample in samples) / len(samples),
                "exact_match_flexible": flexible / len(samples)}


def final_number(text: str) -> str | None:
    found = _STRICT.search(text)
    return _plain(found.group(1)) if found else None


def last_number(text: str) -> str | None:
    found = _NUMBER.findall(text)
    return _plain(found[-1]) if found else None


def _plain(number: str) -> str:
    return number.replace(",", "").rstrip(".")


class Gsm8k(WordProblems):
    """The paper's evaluation template is also the training template; the answers keep their <<a*b=c>> marks."""

    def __init__(self, config: TaskConfig):
        super().__init__(config)
        if config.path is None:
            raise UserError("task.path is missing; give a folder with train.jsonl[.gz] and test.jsonl[.gz], "
                            "or a hub name such as openai/gsm8k")
        self._splits = {split: _read(config.path, split) for split in ("train", "test")}

    def examples(self, split: str, num_examples: int | None = None) -> Sequence[Example]:
        return self._splits[split][:num_examples]


def question_answer(question: str, answer: str) -> Example:
    return Example(f"Question: {question}\nAnswer:", f" {answer}")


def _read(path: str, split: str) -> list[Example]:
    folder = Path(path)
    if not folder.is_dir():
        return _read_hub(path, split)
    for name in (f"{split}.jsonl", f"{split}.jsonl.gz"):
        if (folder / name).is_file():
            return _read_lines(folder / name)
    raise UserError(f"task.path={path} holds no {split}.jsonl and no {split}.jsonl.gz")


def _read_lines(file: Path) -> list[Example]:
    found = []
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                found.append(question_answer(row["question"], row["answer"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} line {len(found) + 1} is no JSON object with question and answer: {error}") from error
    except (OSError, EOFError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    return found


def _read_hub(name: str, split: str) -> list[Example]:
    import datasets

    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"task.path={name}: there is no such folder")
    try:
        rows = datasets.load_dataset(name, "main", split=split)
    except Exception as error:  # datasets raises many kinds; each means that the name cannot be had
        line = str(error).strip().split("\n")[0]
        raise UserError(f"task.path={name} is no folder, and no data set that can be loaded: {line}") from error
    return [question_answer(row["question"], row["answer"]) for row in rows]
