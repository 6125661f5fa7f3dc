"""A model's output head on some positions only. Letters: B batch, T tokens, D width, R rows, V vocabulary.

Where answers are trained, or short examples are padded, most positions predict nothing. Their logits would be the
largest tensor of a step, and the head a large part of the arithmetic of a small model.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


class Head:
    """To be made before DeepSpeed's engine, whose own hooks gather the head's weight."""

    def __init__(self, model: PreTrainedModel):
        self._positions: torch.Tensor | None = None
        head = model.get_output_embeddings()
        # A model without a head of its own may name its embedding, which reads token ids.
        if isinstance(head, nn.Linear):
            head.register_forward_pre_hook(self._select)

    def logits(self, engine: Any, inputs: dict[str, Any], positions: torch.Tensor) -> torch.Tensor:
        """(R, V) of `positions` (R,), indices of the flattened (B, T); `engine` runs the model.

        No positions are no work, but the head still runs, as ZeRO-3 needs it to on every rank.
        """
        self._positions = positions
        try:
            logits = engine(**inputs).logits.flatten(0, 1)
        finally:
            self._positions = None
        return logits if len(logits) == len(positions) else logits[positions]

    def _select(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        """(B, T, D) -> (1, R, D)."""
        states, *others = inputs
        if self._positions is None or states.dim() != 3:
            return None
        return states.flatten(0, 1)[self._positions].unsqueeze(0), *others
