"""General text (evaluate.texts), which tells what pruning and fine-tuning have left of a model beside its task.

Of each model its perplexity, and KL(dense || model) per token in nats: how far its predictions are from those of the
dense model. The ends of texts are not predicted, because texts are cut to a length.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

from sparse_train.config import EvaluateConfig, TaskConfig
from sparse_train.models import Processor
from sparse_train.registry import TASKS
from sparse_train.tasks.batch import IGNORED, Batch
from sparse_train.tasks.likelihood import Likelihood, ScoringHead, like_lengths, predicted
from sparse_train.tasks.selection import scored_examples
from sparse_train.tasks.task import ForEach, in_order


class GeneralText:
    """One set of texts. The first model that is scored is the dense one, with which the others are compared. What its
    head reads (D numbers per token) and the model itself stay in memory, so that no text goes through its blocks again
    for each of the others. Each rank has this of the batches that it makes."""

    def __init__(self, config: TaskConfig, processor: Processor, spec: EvaluateConfig):
        """Raises UserError where there is no text, or none that fits the model."""
        task = TASKS.load(config.name)(config)
        examples, self._num_left_out = scored_examples(
            task, processor, spec.model_copy(update={"num_examples": spec.num_texts}))
        self._batches = [_without_ends(task.batch(like, processor))
                         for like in like_lengths(examples, processor, spec.batch_size)]
        self._dense: ScoringHead | None = None
        self._dense_states: dict[int, torch.Tensor] = {}
        """By batch."""

    def score(self, model: PreTrainedModel, for_each: ForEach = in_order) -> dict[str, Any]:
        """perplexity and kl (0 for the dense model itself) of `model`, which is in eval mode; num_tokens of all texts,
        and num_left_out: how many texts do not fit the model."""
        head = ScoringHead(model)

        @torch.no_grad()
        def score_batch(index: int) -> tuple[Any, ...]:
            batch, part = self._batches[index].to(model.device, model.dtype), Likelihood()
            states, targets = head.states(batch), predicted(batch)
            if self._dense is None:
                self._dense_states[index] = states.cpu()
                part.add(head, states, targets)
            else:
                if index not in self._dense_states:  # the dense model was scored before this process began
                    self._dense_states[index] = self._dense.states(batch).cpu()
                part.add(head, states, targets, self._dense, self._dense_states[index])
            return dataclasses.astuple(part)

        likelihood = Likelihood.total(for_each(len(self._batches), score_batch))
        self._dense = self._dense or head
        return {"perplexity": likelihood.perplexity, "kl": likelihood.kl, "num_tokens": likelihood.num_tokens,
                "num_left_out": self._num_left_out}


def in_tables(metrics: Iterable[str]) -> list[str]:
    """Those of a model's metrics that tables show of sets of texts, such as books/perplexity and books/kl."""
    return [name for name in metrics if name.endswith(("/perplexity", "/kl"))]


def _without_ends(batch: Batch) -> Batch:
    labels = batch.labels.clone()
    labels[torch.arange(len(labels)), batch.attend.sum(1) - 1] = IGNORED
    return dataclasses.replace(batch, labels=labels)
