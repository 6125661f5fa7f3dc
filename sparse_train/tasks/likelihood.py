"""How likely a model finds given tokens: cross-entropy, and the divergence from another model.

Letters: B examples, T tokens, N positions that predict something, n some of those, D width, V vocabulary.

With a long vocabulary the logits of a batch are far larger than everything else that a model computes: 800 MB for 8
texts of 512 tokens and 49,152 entries. So the head runs on positions that predict something alone, and on so many of
them at a time that one tensor of logits has at most 2^22 elements (16 MB in fp32). Four times as many took longer.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from sparse_train.compat.deepspeed import full_shape
from sparse_train.models import Processor
from sparse_train.tasks.batch import IGNORED, Batch, Example, encode

_MOST_LOGITS = 1 << 22
_MOST_TOKENS = 2048  # of a forward pass, with padding: enough for fast products, and few enough to pad little


class ScoringHead:
    """The head of a model, with what the model does behind it (a bias, a scale, a soft cap), apart from its blocks."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self._head: Any = model.get_output_embeddings()
        """None where no module of the model is its head; its logits are then taken for states."""
        self._is_last = False
        """Whether nothing follows the head."""

    def states(self, batch: Batch) -> torch.Tensor:
        """(N, D): what the head reads at the positions that predict something. `batch` is on the model's device."""
        found: list[torch.Tensor] = []
        outputs: list[torch.Tensor] = []
        is_target = batch.targets != IGNORED
        if self._head is None:
            return self.model(**batch.inputs(), use_cache=False).logits[is_target]

        def take(states: torch.Tensor) -> torch.Tensor:
            if states.shape[:-1] != is_target.shape:
                return states
            found.append(states[is_target])
            return states[:1, :1]

        with self._reading(take), _hooked(self._head.register_forward_hook(lambda *call: outputs.append(call[2]))):
            logits = self.model(**batch.inputs(), use_cache=False).logits
        if not found:  # FSMT's output embedding is that of its input tokens, and another module computes the logits
            self._head = None
            return logits[is_target]
        self._is_last = logits is outputs[0]
        return found[0]

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """(n, V) of states (n, D).

        What a model does behind its head is known to its forward pass alone, so that runs on one token, and its head
        reads `states` instead.
        """
        if self._head is None:
            return states
        if self._is_last:
            return self._head(states)
        token = torch.zeros(1, 1, dtype=torch.long, device=states.device)
        inputs: dict[str, Any] = {"input_ids": token}
        if self.model.config.is_encoder_decoder:
            inputs = {"decoder_input_ids": token, "encoder_outputs": (states.new_zeros(1, 1, states.shape[1]),)}
        with self._reading(lambda _: states.unsqueeze(0)):
            return self.model(**inputs, use_cache=False).logits[0]

    def parts(self, states: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """(rows, their logits (n, V) in fp32) of states (N, D)."""
        vocabulary = states.shape[1] if self._head is None else full_shape(self._head.weight)[0]
        size = max(1, _MOST_LOGITS // vocabulary)
        for start in range(0, len(states), size):
            rows = slice(start, start + size)
            yield rows, self.logits(states[rows]).float()

    def _reading(self, change: Callable[[torch.Tensor], torch.Tensor]) -> contextlib.AbstractContextManager[None]:
        """Inside, the head reads `change(states)` in place of its states (B, T, D)."""
        return _hooked(self._head.register_forward_pre_hook(lambda _, inputs: (change(inputs[0]),)))


@contextlib.contextmanager
def _hooked(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@dataclass
class Likelihood:
    """Of the tokens that were counted, in nats per token; None of no tokens."""

    num_tokens: int = 0
    _sum: float = 0.0
    """Of negative log-likelihoods."""
    _divergence: float = 0.0
    """Sum of KL(other model || model)."""

    @classmethod
    def total(cls, parts: Iterable[tuple[int, float, float]]) -> "Likelihood":
        """Of parts as `astuple` gives them. The sums are exact but for their last rounding, in whatever order."""
        counts, sums, divergences = zip(*parts, strict=True)
        return cls(sum(counts), math.fsum(sums), math.fsum(divergences))

    @property
    def cross_entropy(self) -> float | None:
        return self._sum / self.num_tokens if self.num_tokens else None

    @property
    def perplexity(self) -> float | None:
        return None if self.cross_entropy is None else math.exp(min(self.cross_entropy, 700))

    @property
    def kl(self) -> float | None:
        """KL(other model || model); 0 where there is no other."""
        return self._divergence / self.num_tokens if self.num_tokens else None

    def add(self, head: ScoringHead, states: torch.Tensor, targets: torch.Tensor, other: ScoringHead | None = None,
            other_states: torch.Tensor | None = None) -> None:
        """Count N tokens: `head` reads states (N, D) and should predict `targets` (N,); `other` is the other model's
        head, which reads `other_states` (N, D) at the same positions."""
        for rows, logits in head.parts(states):
            logs = functional.log_softmax(logits, -1)
            del logits
            self._sum -= float(logs.gather(-1, targets[rows, None]).double().sum())
            if other is not None and other_states is not None:
                other_logs = functional.log_softmax(other.logits(other_states[rows].to(states.device)).float(), -1)
                logs.sub_(other_logs)
                self._divergence -= float(other_logs.exp_().mul_(logs).sum(-1).double().sum())
        self.num_tokens += len(targets)


def like_lengths(examples: Sequence[Example], processor: Processor, most: int) -> Iterator[list[Example]]:
    """All examples in groups of like length, at most `most` each, and of few enough tokens for one forward pass."""
    lengths = [sum(map(len, encode(example, processor))) for example in examples]
    group: list[Example] = []
    for index in sorted(range(len(examples)), key=lengths.__getitem__):
        if group and (len(group) == most or (len(group) + 1) * lengths[index] > _MOST_TOKENS):
            yield group
            group = []
        group.append(examples[index])
    if group:
        yield group


def predicted(batch: Batch) -> torch.Tensor:
    """(N,): the tokens that the positions of `batch` predict."""
    return batch.targets[batch.targets != IGNORED]
