"""Conversations, written by the model's own chat template; every turn of the assistant is an answer.

task.path: a folder with {train,test}.jsonl (packed .gz or .xz too), a .jsonl file, or a hub data set. A row has

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}

or a `prompt` and a `completion`. Messages after the last of the assistant's are left out. Where the data has no test
split, conversations are split into training and test by their first question. Scores are the perplexity of the answers;
the last one of each conversation is generated too, as a sample.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from sparse_train.config import TaskConfig
from sparse_train.errors import UserError
from sparse_train.tasks import read
from sparse_train.tasks.batch import Example
from sparse_train.tasks.conversation import ASSISTANT
from sparse_train.tasks.task import Task


class Chat(Task):
    metric = "perplexity"
    higher_is_better = False
    takes_chat = True

    def __init__(self, config: TaskConfig):
        super().__init__(config)
        self._path = read.local(config, "a .jsonl file, or a folder with train.jsonl and test.jsonl")

    def read(self, split: str) -> Sequence[Example]:
        rows, has_splits = self._rows(split)
        examples = read.usable(rows, self._example, self.config)
        if has_splits:
            return examples
        return [example for example in read.shuffled(examples, str)
                if read.in_test(_first_question(example), self.config.test_share) == (split == "test")]

    def measure(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        return {}

    def _rows(self, split: str) -> tuple[Iterable[tuple[str, Any]], bool]:
        """((place, line or hub row) of the split, True), or (those of all the data, False) where it has no splits."""
        path, config = self._path, self.config
        if path is None:
            hub_rows, has_splits = read.hub_split(config, split)
            return ((place, row) for place, (_, row) in hub_rows), has_splits
        of_split = {part: read.split_files(path, config.split_name(part), "jsonl") for part in ("train", "test")}
        has_splits = all(of_split.values())
        files = of_split[split] if has_splits else of_split["train"] or [path]
        if not files[0].is_file():
            raise UserError(f"{config.key}.path={path} holds no {config.train_split}.jsonl "
                            f"({config.key}.train_split)")
        return itertools.chain.from_iterable(map(read.rows, files)), has_splits

    def _example(self, row: Any) -> Example:
        if isinstance(row, str):
            row = read.parse_json(row)
        if "messages" in row:
            if not isinstance(row["messages"], list):
                raise read.Unusable("no list in column 'messages'")
            messages = [(read.text_of(message, "role"), read.text_of(message, "content"))
                        for message in row["messages"]]
        else:
            messages = [("user", read.text_of(row, "prompt")), (ASSISTANT, read.text_of(row, "completion"))]
        while messages and messages[-1][0] != ASSISTANT:
            messages.pop()
        if len(messages) < 2 or messages[-2][0] != "user" or messages[0][0] == ASSISTANT:
            raise read.Unusable("no answer of the assistant's to a user")
        before = tuple(messages[:-2])
        if not any(role == "system" for role, _ in before):
            before = self.system + before
        return Example(messages[-2][1], messages[-1][1], history=before)


def _first_question(example: Example) -> str:
    return next((content for role, content in example.history or () if role == "user"), example.prompt)
