"""What every task shares: batches, generation, the score."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel

from sparse_train.config import EvaluateConfig, TaskConfig
from sparse_train.models import Processor
from sparse_train.tasks.batch import IGNORED, Batch, Example, collate, encode, encoder_input, pad_rows, windows


@dataclass(frozen=True)
class Score:
    metrics: dict[str, Any]
    samples: list[dict[str, Any]]
    """prompt, answer, prediction and what the task adds; in the order of the examples."""


class Task(ABC):
    endless = False
    """Whether the training examples never repeat."""
    metric: str
    """The headline among the metrics of measure(), or cross_entropy."""
    best = max
    """min where less of the metric is better."""
    generates = True
    """Whether answers are generated for; otherwise only the cross-entropy of the true ones is taken."""

    def __init__(self, config: TaskConfig):
        self.config = config

    @abstractmethod
    def examples(self, split: str, num_examples: int | None = None) -> Sequence[Example]:
        """The first `num_examples` (None: all) of "train" or "test"."""

    @abstractmethod
    def measure(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Metrics of samples with answer and prediction; may add to the samples what was found of each."""

    def batch(self, examples: Sequence[Example], processor: Processor) -> Batch:
        return collate(examples, processor)

    def fits(self, example: Example, processor: Processor) -> bool:
        """Whether a training example is at most config.max_length tokens long and its sound fits the model's window."""
        if sum(map(len, encode(example, processor))) > self.config.max_length:
            return False
        return len(windows(example, processor)) == 1

    def score(self, model: PreTrainedModel, processor: Processor, examples: Sequence[Example], spec: EvaluateConfig,
              progress: Callable[[int, int], None] | None = None) -> Score:
        """Generated answers against the true ones.

        Metrics: measure()'s; cross_entropy (nats per token of the true answers, end of text included) and perplexity;
        num_examples. Sound longer than the model's window is answered window by window; its true answer cannot be
        laid against them and is left out of the cross-entropy.
        """
        was_training = model.training
        model.eval()
        # Prompts of like length share a batch, which saves padding; ties keep their order.
        order = sorted(range(len(examples)), key=lambda i: len(encode(examples[i], processor)[0]))
        predictions: dict[int, str] = {}
        total = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad():
            for start in range(0, len(order), spec.batch_size):
                chosen = order[start:start + spec.batch_size]
                part = [examples[i] for i in chosen]
                whole = [example for example in part if len(windows(example, processor)) == 1]
                total += _cross_entropy(model, self.batch(whole, processor).to(model.device)).cpu()
                if self.generates:
                    predictions.update(zip(chosen, generate(model, processor, part, spec), strict=True))
                if progress:
                    progress(start + len(chosen), len(order))
        model.train(was_training)
        samples = [{"prompt": example.prompt, "answer": example.answer, "prediction": predictions.get(i, "")}
                   for i, example in enumerate(examples)]
        cross_entropy = float(total[0] / total[1].clamp(min=1))
        return Score({**(self.measure(samples) if self.generates else {}), "cross_entropy": cross_entropy,
                      "perplexity": math.exp(min(cross_entropy, 700)), "num_examples": len(samples)}, samples)


def training_examples(task: Task, processor: Processor,
                      num_examples: int | None) -> tuple[Sequence[Example], int]:
    """(the first `num_examples` training examples, how many of them were too long and are left out)."""
    examples = task.examples("train", num_examples)
    if task.endless and num_examples is None:
        return examples, 0
    kept = [example for example in examples if task.fits(example, processor)]
    return kept, len(examples) - len(kept)


def _cross_entropy(model, batch: Batch) -> torch.Tensor:
    """(2,) float64: the sum over target tokens and their number."""
    logits, targets = model(**batch.inputs(), use_cache=False).logits, batch.targets
    loss = functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum",
                                    ignore_index=IGNORED)
    return torch.stack([loss, (targets != IGNORED).sum()]).double()


def generate(model, processor: Processor, examples: Sequence[Example], spec: EvaluateConfig,
             min_new_tokens: int | None = None) -> list[str]:
    """The text that `model` answers each example with, greedily or by spec.num_beams."""
    parts = [windows(example, processor) for example in examples]
    told = iter(_generate(model, processor, [part for several in parts for part in several], spec, min_new_tokens))
    return [" ".join(next(told) for _ in several) for several in parts]


def _generate(model, processor, examples, spec, min_new_tokens) -> list[str]:
    tokenizer = processor.tokenizer
    settings = {"do_sample": False, "use_cache": True, "num_beams": spec.num_beams, "eos_token_id":
                tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "max_length": None,
                "max_new_tokens": spec.max_new_tokens, "min_new_tokens": min_new_tokens}
    if processor.decoder_prefix:
        start = torch.tensor([processor.decoder_prefix] * len(examples))
        given = Batch(start, torch.ones_like(start, dtype=torch.bool), start, encoder_input(examples, processor))
    else:
        rows, attend = pad_rows([encode(example, processor)[0] for example in examples], processor, on_left=True)
        given = Batch(rows, attend, rows)
    # Whisper's own generate() adds timestamps and windows; here a clip is one window.
    made = GenerationMixin.generate(model, **given.to(model.device).inputs(), **settings)
    return tokenizer.batch_decode(made[:, given.input_ids.shape[1]:], skip_special_tokens=True)
