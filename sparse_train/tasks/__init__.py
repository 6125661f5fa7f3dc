"""Tasks: examples -> batches; predictions -> score."""

import importlib

from sparse_train.config import TaskConfig
from sparse_train.tasks.batch import Batch, Example
from sparse_train.tasks.decoding import generate
from sparse_train.tasks.selection import scored_examples, training_examples
from sparse_train.tasks.task import Score, Task
from sparse_train.tasks.tokenizer import build_tokenizer

__all__ = ["Batch", "Example", "Score", "Task", "build_task", "build_tokenizer", "generate",
           "scored_examples", "task_class", "training_examples"]

# By module and class: a task's own libraries are loaded when it is asked for.
_TASKS = {
    "arithmetic": "Arithmetic", "gsm8k": "Gsm8k", "translation": "Translation", "numbers": "Numbers",
    "speech": "Speech", "dialtones": "DialTones", "text": "Text",
}


def build_task(config: TaskConfig) -> Task:
    """Raises UserError where the task's data is missing."""
    return task_class(config.name)(config)


def task_class(name: str) -> type[Task]:
    return getattr(importlib.import_module(f"sparse_train.tasks.{name}"), _TASKS[name])
