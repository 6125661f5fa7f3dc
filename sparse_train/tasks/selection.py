"""Which examples a model can take. The others are left out, counted and named in the log."""

import logging
from collections.abc import Callable, Sequence

from sparse_train.config import EvaluateConfig
from sparse_train.errors import UserError
from sparse_train.models import Processor
from sparse_train.tasks import read
from sparse_train.tasks.batch import Example, fits_model
from sparse_train.tasks.conversation import Unwritable
from sparse_train.tasks.task import Task

log = logging.getLogger(__name__)
_NUM_CHECKED = 100  # examples of an endless task that stand for the rest
_MAX_UNFIT = 1000  # examples of an endless task, after which none is expected to fit


def training_examples(task: Task, processor: Processor,
                      num_examples: int | None) -> tuple[Sequence[Example], int]:
    """(the first `num_examples` training examples that fit, how many before them are left out).

    Raises UserError where none fits.
    """
    if task.endless and num_examples is None:
        examples = task.examples("train")
        # They are generated in the step that uses them, so none can be left out; the first ones show how long they get.
        if not all(fits_model(example, processor) for example in examples[:_NUM_CHECKED]):
            raise UserError(f"training examples of {task.config.key}.name={task.config.name} do not fit the model "
                            f"({_bounds(processor)}); give it more positions (model.max_seq_len), or give "
                            "finetune.num_examples and dense.num_examples, so that those are left out")
        return examples, 0
    return _fitting(
        task, "train", num_examples, lambda example: task.fits(example, processor),
        f"are longer than {task.config.key}.max_length={task.config.max_length} tokens or do not fit the model "
        f"({_bounds(processor)})", f"raise {task.config.key}.max_length, or split them")


def scored_examples(task: Task, processor: Processor, spec: EvaluateConfig) -> tuple[Sequence[Example], int]:
    """(the first spec.num_examples test examples that the model can answer, how many before them are left out): there
    is a position for each token of the prompt and spec.max_new_tokens more, and of the true answer.

    Raises UserError where there is none.
    """
    new_tokens = spec.max_new_tokens if task.generates else 0
    kept_free = f"; {new_tokens} new tokens" if new_tokens else ""
    return _fitting(
        task, "test", spec.num_examples, lambda example: fits_model(example, processor, new_tokens),
        f"do not fit the model ({_bounds(processor)}{kept_free})",
        "give shorter examples, fewer task.shots or new tokens (evaluate.max_new_tokens, benchmark.new_tokens), or a "
        "model with more positions")


def _bounds(processor: Processor) -> str:
    features = processor.features
    bounds = ((processor.positions, "{} positions"), (processor.encoder_positions, "{} in its encoder"),
              (features and f"{features.n_samples / features.sampling_rate:g}", "a window of {} s"),
              (processor.num_embedded, "{} embedded token ids"))
    return ", ".join(text.format(value) for value, text in bounds if value)


def _fitting(task: Task, split: str, num_examples: int | None, fits: Callable[[Example], bool], why: str,
             remedy: str) -> tuple[Sequence[Example], int]:
    examples = task.examples(split)
    kept: list[int] = []
    left_out: list[str] = []
    or_template = ""
    for index, example in enumerate(examples):
        if len(kept) == num_examples or (task.endless and not kept and index == _MAX_UNFIT):
            break
        try:
            if fits(example):
                kept.append(index)
            else:
                left_out.append(repr(f"{example.prompt}{example.answer}"[:40]))
        except Unwritable as error:
            left_out.append(str(error))
            or_template = " or its chat template"
    kind = {"train": "training"}.get(split, split)
    summary = (f"{len(left_out)} of the first {len(kept) + len(left_out)} {kind} examples {why}{or_template}: "
               f"{read.some(left_out)}")
    if not kept:
        raise UserError(f"no {kind} example is left: {summary}; {remedy}")
    if left_out:
        log.warning("%s", summary)
    return read.Rows(examples, kept), len(left_out)
