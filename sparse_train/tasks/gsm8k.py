"""GSM8K (Cobbe et al., arXiv 2110.14168): question / answer lines, from a folder or the hub.

The paper trains on the raw question followed by the raw answer and evaluates with "Question: ...\nAnswer:"; here both
have the latter, unless the templates say otherwise (task.prompt, task.answer, task.test_prompt). Answers keep their
<<a*b=c>> marks. As turns of a chat (task.chat) they are the question and the answer alone; solved examples (task.shots)
are part of the user's turn.

Scores are those of lm-evaluation-harness's task gsm8k 3.0, strict-match and flexible-extract, with these differences:
task.shots solved examples are the first training ones, the same for every test example, 0 by default where the harness
has 5; generation ends at the end of text or evaluate.max_new_tokens, and what follows a "Question:" is cut afterwards.
"""

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sparse_train.config import TaskConfig
from sparse_train.errors import UserError
from sparse_train.tasks import read
from sparse_train.tasks.batch import Example
from sparse_train.tasks.task import Task

# Both filters and what an exact match ignores, as in the harness.
_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_IGNORED = (re.compile(","), re.compile(r"\$"), re.compile(r"(?s).*#### "), re.compile(r"\.$"))
_TEMPLATES, _NEXT = ("Question: {question}\nAnswer:", " {answer}"), "Question:"
_TURNS = ("{question}", "{answer}")


class WordProblems(Task):
    """Questions with a number as their answer."""

    metric = "exact_match"
    extra_metrics = ("exact_match_flexible",)
    score_settings = ("shots",)
    takes_chat = True

    def problem(self, question: str, answer: str, split: str = "train") -> Example:
        return self.fill_templates(split, _TURNS if self.config.chat else _TEMPLATES,
                                   {"question": question, "answer": answer})

    def measure(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """exact_match (the number after ####), exact_match_flexible (the last number), and how many shots."""
        for sample in samples:
            # What a model generates after it asks itself a new question does not count.
            prediction, answer = sample["prediction"].partition(_NEXT)[0], _plain(sample["answer"].strip())
            sample["correct"] = final_number(prediction) == answer
            sample["correct_flexible"] = last_number(prediction) == answer
        return {"exact_match": sum(sample["correct"] for sample in samples) / len(samples),
                "exact_match_flexible": sum(sample["correct_flexible"] for sample in samples) / len(samples),
                "shots": self.config.shots}


def final_number(text: str) -> str | None:
    """The number after ####; None where there is none."""
    match = _STRICT.search(text)
    return _plain(match.group(1)) if match else None


def last_number(text: str) -> str | None:
    """The last number; None where there is none."""
    matches = _FLEXIBLE.findall(text)
    return _plain("".join(matches[-1])) if matches else None  # one of the two groups is empty


def _plain(number: str) -> str:
    for ignored in _IGNORED:
        number = ignored.sub("", number)
    return number


class Gsm8k(WordProblems):
    def __init__(self, config: TaskConfig):
        super().__init__(config)
        self._path = read.local(config, "a folder with train.jsonl[.gz] and test.jsonl[.gz]")

    def read(self, split: str) -> Sequence[Example]:
        shots = ""
        if split == "test" and self.config.shots:
            solved = [self.problem(*pair, split) for pair in self._pairs("train")[:self.config.shots]]
            between = "\n" if self.config.chat else ""
            shots = "".join(f"{example.prompt}{between}{example.answer}\n\n" for example in solved)
        return [replace(example, prompt=shots + example.prompt) for example in
                (self.problem(*pair, split) for pair in self._pairs(split))]

    def _pairs(self, split: str) -> list[tuple[str, str]]:
        config, name = self.config, self.config.split_name(split)
        if self._path is None:
            hub_rows = read.numbered(read.hub_rows(config, name, config.subset or "main"), config, name)
            return read.usable(hub_rows, lambda pair: _columns(pair[1]), config)
        files = read.split_files(self._path, name, "jsonl")
        if not files:
            raise UserError(f"{config.key}.path={config.path} holds no {name}.jsonl and no {name}.jsonl.gz")
        rows = itertools.chain.from_iterable(map(read.rows, files))
        return read.usable(rows, lambda line: _columns(read.parse_json(line)), config)


def _columns(row: dict) -> tuple[str, str]:
    return read.text_of(row, "question"), read.text_of(row, "answer")
