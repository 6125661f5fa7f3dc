"""Tasks: examples, batches of them, generated answers, scores.

    task.py                                   the base class of tasks
    arithmetic.py, numbers.py, dialtones.py   generated tasks (generated.py), which need no data
    gsm8k.py, translation.py, speech.py, text.py, chat.py   tasks that read files or the hub (read.py)
    batch.py, packing.py, selection.py        batches; windows of several examples; which examples fit a model
    conversation.py                           conversations through a tokenizer's chat template
    decoding.py                               generation
    likelihood.py, general_text.py            cross-entropy; perplexity and divergence on general text
    tokenizer.py                              tokenizers of new models

The tasks are the table TASKS of sparse_train/registry.py.
"""

from sparse_train.config import TaskConfig
from sparse_train.registry import TASKS
from sparse_train.tasks.batch import Batch, Example
from sparse_train.tasks.decoding import generate
from sparse_train.tasks.selection import scored_examples, training_examples
from sparse_train.tasks.task import ForEach, Score, Task, in_order
from sparse_train.tasks.tokenizer import build_tokenizer

__all__ = ["Batch", "Example", "ForEach", "Score", "Task", "build_task", "build_tokenizer", "generate", "in_order",
           "scored_examples", "training_examples"]

def build_task(config: TaskConfig) -> Task:
    """Raises UserError where the task's data is missing, or for options that it does not have."""
    return TASKS.load(config.name)(config)
