"""Tasks: examples -> batches; predictions -> score."""

from sparse_train.config import TaskConfig
from sparse_train.tasks.arithmetic import Arithmetic
from sparse_train.tasks.batch import Batch, Example
from sparse_train.tasks.gsm8k import Gsm8k
from sparse_train.tasks.task import Score, Task, generate, training_examples
from sparse_train.tasks.tokenizer import build_tokenizer

__all__ = ["Batch", "Example", "Score", "Task", "build_task", "build_tokenizer", "generate",
           "training_examples"]

_TASKS = {"arithmetic": Arithmetic, "gsm8k": Gsm8k}


def build_task(config: TaskConfig) -> Task:
    """Raises UserError where the task's data is missing."""
    return _TASKS[config.name](config)
