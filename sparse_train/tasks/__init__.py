"""Tasks: examples -> batches; predictions -> score."""

from sparse_train.config import TaskConfig
from sparse_train.registry import TASKS
from sparse_train.tasks.batch import Batch, Example
from sparse_train.tasks.decoding import generate
from sparse_train.tasks.selection import scored_examples, training_examples
from sparse_train.tasks.task import Score, Task
from sparse_train.tasks.tokenizer import build_tokenizer

__all__ = ["Batch", "Example", "Score", "Task", "build_task", "build_tokenizer", "generate",
           "scored_examples", "training_examples"]

def build_task(config: TaskConfig) -> Task:
    """Raises UserError where the task's data is missing, or for options that it does not have."""
    return TASKS.load(config.name)(config)
