"""Examples as token tensors. Letters: B examples, T tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

IGNORED = -100


@dataclass(frozen=True)
class Example:
    prompt: str
    answer: str


@dataclass(frozen=True)
class Batch:
    input_ids: torch.Tensor
    """(B, T) int64."""
    attend: torch.Tensor
    """(B, T) bool: True at real tokens."""
    labels: torch.Tensor
    """(B, T) int64: the answer's tokens and the end-of-text token where they stand, -100 elsewhere. The loss shifts."""

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.input_ids.to(device), self.attend.to(device), self.labels.to(device))


def encode(example: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """(prompt ids, answer ids with end-of-text), each tokenised alone, so that generation sees the same prompt."""
    prompt, answer = (tokenizer.encode(text, add_special_tokens=False) for text in (example.prompt, example.answer))
    return prompt, [*answer, tokenizer.eos_token_id]


def collate(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> Batch:
    """Padded on the right to the longest. No examples make one row of padding: a rank without work still takes part."""
    rows = [encode(example, tokenizer) for example in examples] or [([], [tokenizer.pad_token_id])]
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    input_ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    labels = torch.full((len(rows), longest), IGNORED)
    attend = torch.zeros(len(rows), longest, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(rows if examples else ()):
        end = len(prompt) + len(answer)
        input_ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt):end] = torch.tensor(answer)
        attend[row, :end] = True
    return Batch(input_ids, attend, labels)
