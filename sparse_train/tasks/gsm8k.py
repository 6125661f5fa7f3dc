"""GSM8K (Cobbe et al., arXiv 2110.14168): question / answer lines, from a folder or the hub.

The paper trains on the raw question followed by the raw answer and evaluates with "Question: ...\nAnswer:"; here both
have the latter, unless the templates say otherwise (task.prompt, task.answer, task.test_prompt). Answers keep their
<<a*b=c>> marks.
"""

import re
from collections.abc import Sequence
from typing import Any

from sparse_train.config import TaskConfig
from sparse_train.errors import UserError
from sparse_train.tasks import read
from sparse_train.tasks.batch import Example
from sparse_train.tasks.task import Task

# GSM8K's own rule, as in lm-evaluation-harness "strict-match"; "flexible" takes the last number of the text.
_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_NUMBER = re.compile(r"-?[0-9][0-9.,]*")
_PROMPT, _ANSWER, _NEXT = "Question: {question}\nAnswer:", " {answer}", "Question:"


class WordProblems(Task):
    """Questions with a number as their answer."""

    metric = "exact_match"

    def problem(self, question: str, answer: str, split: str = "train") -> Example:
        template = (self.config.test_prompt if split == "test" else None) or self.config.prompt or _PROMPT
        columns = {"question": question, "answer": answer}
        return Example(read.fill(template, "prompt", **columns),
                       read.fill(self.config.answer or _ANSWER, "answer", **columns))

    def measure(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """exact_match (the number after ####), exact_match_flexible (the last number), and how many shots."""
        flexible = 0
        for sample in samples:
            # As the harness does: what a model says after it asks itself a new question does not count.
            said, wanted = sample["prediction"].partition(_NEXT)[0], final_number(sample["answer"])
            sample["correct"] = final_number(said) == wanted
            flexible += last_number(said) == wanted
        return {"exact_match": sum(sample["correct"] for sample in samples) / len(samples),
                "exact_match_flexible": flexible / len(samples), "shots": self.config.shots}


def final_number(text: str) -> str | None:
    found = _STRICT.search(text)
    return _plain(found.group(1)) if found else None


def last_number(text: str) -> str | None:
    found = _NUMBER.findall(text)
    return _plain(found[-1]) if found else None


def _plain(number: str) -> str:
    return number.replace(",", "").rstrip(".")


class Gsm8k(WordProblems):
    def __init__(self, config: TaskConfig):
        super().__init__(config)
        path = read.local(config, "a folder with train.jsonl[.gz] and test.jsonl[.gz]")
        self._splits = {}
        for split in ("train", "test"):
            if path is None:
                rows, parse = read.hub_rows(config, split, config.subset or "main"), dict
            else:
                file = read.split_file(path, split, "jsonl")
                if file is None:
                    raise UserError(f"task.path={config.path} holds no {split}.jsonl and no {split}.jsonl.gz")
                rows, parse = read.lines(file), read.parse_json
            self._splits[split] = read.usable(rows, lambda row, split=split, parse=parse: self.problem(
                read.text_of(row := parse(row), "question"), read.text_of(row, "answer"), split), config)
        solved = "".join(f"{example.prompt}{example.answer}\n\n" for example in self._splits["train"][:config.shots])
        self._splits["test"] = [Example(solved + example.prompt, example.answer) for example in self._splits["test"]]

    def examples(self, split: str, num_examples: int | None = None) -> Sequence[Example]:
        return self._splits[split][:num_examples]
