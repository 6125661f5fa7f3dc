"""The base class of tasks: examples, batches, the score."""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from sparse_train.config import EvaluateConfig, Section, TaskConfig
from sparse_train.config.options import read_options
from sparse_train.errors import UserError
from sparse_train.models import Processor
from sparse_train.tasks import read
from sparse_train.tasks.batch import Batch, Example, collate, encode_prompt, fits_model, windows
from sparse_train.tasks.conversation import Message
from sparse_train.tasks.decoding import generate
from sparse_train.tasks.likelihood import Likelihood, ScoringHead, like_lengths, predicted

ForEach = Callable[[int, Callable[[int], Any]], list[Any]]
"""for_each(count, work) is work(i) of every i < count, in order. What `work` returns is plain data and does not depend
on its other calls, so ranks may divide them, and some may have been made by a process that was stopped."""


def in_order(count: int, work: Callable[[int], Any], progress: Callable[[int, int], None] | None = None) -> list[Any]:
    """ForEach in this process."""
    results = []
    for index in range(count):
        results.append(work(index))
        if progress:
            progress(index + 1, count)
    return results


@dataclass(frozen=True)
class Score:
    metrics: dict[str, Any]
    samples: list[dict[str, Any]]
    """prompt, answer, prediction and the keys that measure() adds; in the order of the examples."""


class Task(ABC):
    Options: ClassVar[type[Section]] = Section
    """Schema of `task.options`, the task's own settings."""
    endless = False
    """Whether the training examples never repeat."""
    takes_audio = False
    """Whether inputs are audio (speech models only)."""
    metric: str
    """The headline among the metrics of measure(), or perplexity."""
    extra_metrics: tuple[str, ...] = ()
    """Further metrics that the report's table shows."""
    score_settings: tuple[str, ...] = ()
    """Entries of measure() that describe how the scores were taken, such as shots, rather than a score."""
    higher_is_better = True
    """Of `metric`."""
    takes_chat = False
    """Whether its questions and answers can be turns of a chat (task.chat)."""
    generates = True
    """Whether the model generates answers; otherwise only the cross-entropy of the true ones is measured."""

    def __init__(self, config: TaskConfig):
        """Raises UserError for options that the task does not have."""
        if config.chat and not self.takes_chat:
            raise UserError(f"{config.key}.chat=true: task {config.name} has no questions that a user could ask; leave "
                            "it out")
        self.config = config
        self.options = read_options(self.Options, config.options, f"{config.key}.options",
                                    f"{config.key}.name={config.name}")
        self._splits: dict[str, Sequence[Example]] = {}

    @abstractmethod
    def read(self, split: str) -> Sequence[Example]:
        """All examples of "train" or "test"."""

    def examples(self, split: str, num_examples: int | None = None) -> Sequence[Example]:
        """The first `num_examples` (None: all) of "train" or "test", which is read on first use.

        Raises UserError where the data cannot be read or has none.
        """
        if split not in self._splits:
            self._splits[split] = self.read(split)
            if not self._splits[split]:
                key = self.config.key
                raise UserError(f"{key}.path={self.config.path} has no row of the {split} split; see "
                                f"{key}.{split}_split ({self.config.split_name(split)}) and, for data without splits, "
                                f"{key}.test_share")
        return self._splits[split][:num_examples]

    def fill_templates(self, split: str, defaults: tuple[str, str], columns: dict[str, str]) -> Example:
        """The config's templates of prompt and answer, or `defaults`, with {column} replaced; turns of a chat where
        task.chat says so. Raises UserError."""
        prompt = "test_prompt" if split == "test" and self.config.test_prompt else "prompt"
        return Example(read.fill(getattr(self.config, prompt) or defaults[0], f"{self.config.key}.{prompt}", columns),
                       read.fill(self.config.answer or defaults[1], f"{self.config.key}.answer", columns),
                       history=self.system if self.config.chat else None)

    @property
    def system(self) -> tuple[Message, ...]:
        """task.system as the messages that it puts in front of a conversation."""
        return () if self.config.system is None else (("system", self.config.system),)

    @abstractmethod
    def measure(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Metrics of samples with answer and prediction; may add keys to each sample."""

    def batch(self, examples: Sequence[Example], processor: Processor) -> Batch:
        return collate(examples, processor)

    def fits(self, example: Example, processor: Processor) -> bool:
        """Whether a training example is at most config.max_length tokens long and fits the model's positions and, as
        sound, its window."""
        return (fits_model(example, processor, longest=self.config.max_length)
                and len(windows(example, processor)) == 1)

    def score(self, model: PreTrainedModel, processor: Processor, examples: Sequence[Example], spec: EvaluateConfig,
              for_each: ForEach = in_order) -> Score:
        """Generated answers against the true ones; `for_each` makes the batches.

        Metrics: measure()'s; cross_entropy (nats per token of the true answers, end of text included) and perplexity;
        num_examples. Sound longer than the model's window is answered window by window; its true answer cannot be
        laid against them and is left out of the cross-entropy, which is None, as perplexity is, where all are longer.
        """
        was_training = model.training
        model.eval()
        # Prompts of like length share a batch, which saves padding; ties keep their order.
        order = sorted(range(len(examples)), key=lambda i: len(encode_prompt(examples[i], processor)))
        head = ScoringHead(model)

        @torch.no_grad()
        def score_batch(index: int) -> list[Any]:
            """[sums of the likelihood, predictions]"""
            part = [examples[i] for i in order[index * spec.batch_size:(index + 1) * spec.batch_size]]
            whole = [example for example in part if len(windows(example, processor)) == 1]
            answers = Likelihood()
            for like in like_lengths(whole, processor, spec.batch_size):
                batch = self.batch(like, processor).to(model.device, model.dtype)
                answers.add(head, head.states(batch), predicted(batch))
            return [astuple(answers), generate(model, processor, part, spec) if self.generates else [""] * len(part)]

        sums, answered = zip(*for_each(-(-len(order) // spec.batch_size), score_batch), strict=True)
        model.train(was_training)
        answers = Likelihood.total(sums)
        predictions = dict(zip(order, itertools.chain(*answered), strict=True))
        samples = [{"prompt": example.prompt, "answer": example.answer, "prediction": predictions[i]}
                   for i, example in enumerate(examples)]
        return Score({**(self.measure(samples) if self.generates else {}), "cross_entropy": answers.cross_entropy,
                      "perplexity": answers.perplexity, "num_examples": len(samples)}, samples)
