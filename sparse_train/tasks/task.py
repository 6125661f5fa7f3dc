"""What every task of prompts and answers shares: batches, generation, the score."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparse_train.config import TaskConfig
from sparse_train.tasks.batch import IGNORED, Batch, Example, collate, encode

# GSM8K's own rule, as in lm-evaluation-harness "strict-match"; "flexible" takes the last number of the text.
_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_NUMBER = re.compile(r"-?[0-9][0-9.,]*")


@dataclass(frozen=True)
class Score:
    metrics: dict[str, float]
    samples: list[dict[str, Any]]
    """prompt, answer, prediction, correct; in the order of the examples."""


class Task(ABC):
    endless = False
    """Whether the training examples never repeat."""

    def __init__(self, config: TaskConfig):
        self.config = config

    @abstractmethod
    def examples(self, split: str, num_examples: int | None = None) -> Sequence[Example]:
        """The first `num_examples` (None: all) of "train" or "test"."""

    def batch(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> Batch:
        return collate(examples, tokenizer)

    def score(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example],
              batch_size: int, max_new_tokens: int, progress: Callable[[int, int], None] | None = None) -> Score:
        """Greedy answers against the true ones.

        Metrics: exact_match (the number after ####), exact_match_flexible (the last number), cross_entropy (nats per
        token of the true answers, end of text included).
        """
        was_training = model.training
        model.eval()
        # Prompts of like length share a batch, which saves padding; ties keep their order.
        order = sorted(range(len(examples)), key=lambda i: len(encode(examples[i], tokenizer)[0]))
        predictions: dict[int, str] = {}
        total = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad():
            for start in range(0, len(order), batch_size):
                chosen = order[start:start + batch_size]
                part = [examples[i] for i in chosen]
                total += _cross_entropy(model, self.batch(part, tokenizer).to(model.device)).cpu()
                predictions.update(zip(chosen, _generate(model, tokenizer, part, max_new_tokens), strict=True))
                if progress:
                    progress(start + len(chosen), len(order))
        model.train(was_training)
        samples = [{"prompt": example.prompt, "answer": example.answer, "prediction": predictions[i],
                    "correct": final_number(predictions[i]) == final_number(example.answer)}
                   for i, example in enumerate(examples)]
        flexible = [last_number(sample["prediction"]) == final_number(sample["answer"]) for sample in samples]
        return Score({"exact_match": sum(sample["correct"] for sample in samples) / len(samples),
                      "exact_match_flexible": sum(flexible) / len(samples),
                      "cross_entropy": float(total[0] / total[1]), "num_examples": len(samples)}, samples)


def training_examples(task: Task, tokenizer: PreTrainedTokenizerBase,
                      num_examples: int | None) -> tuple[Sequence[Example], int]:
    """(the first `num_examples` training examples of at most config.max_length tokens, how many were too long)."""
    examples = task.examples("train", num_examples)
    if task.endless and num_examples is None:
        return examples, 0
    kept = [example for example in examples if sum(map(len, encode(example, tokenizer))) <= task.config.max_length]
    return kept, len(examples) - len(kept)


def final_number(text: str) -> str | None:
    found = _STRICT.search(text)
    return _plain(found.group(1)) if found else None


def last_number(text: str) -> str | None:
    found = _NUMBER.findall(text)
    return _plain(found[-1]) if found else None


def _plain(number: str) -> str:
    return number.replace(",", "").rstrip(".")


def _cross_entropy(model, batch: Batch) -> torch.Tensor:
    """(2,) float64: the sum over target tokens and their number."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attend.long(), use_cache=False).logits
    targets = batch.labels[:, 1:]
    loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="sum",
                                    ignore_index=IGNORED)
    return torch.stack([loss, (targets != IGNORED).sum()]).double()


def _generate(model, tokenizer, examples: Sequence[Example], max_new_tokens: int) -> list[str]:
    prompts = [encode(example, tokenizer)[0] for example in examples]
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    input_ids = torch.tensor([[tokenizer.pad_token_id] * pad + prompt
                              for pad, prompt in zip(padding, prompts, strict=True)], device=model.device)
    attend = torch.tensor([[0] * pad + [1] * len(prompt) for pad, prompt in zip(padding, prompts, strict=True)],
                          device=model.device)
    made = model.generate(input_ids=input_ids, attention_mask=attend, do_sample=False, use_cache=True,
                          max_new_tokens=max_new_tokens, eos_token_id=tokenizer.eos_token_id,
                          pad_token_id=tokenizer.pad_token_id)
    return tokenizer.batch_decode(made[:, longest:], skip_special_tokens=True)
