"""SquareHead (arXiv 2310.06927): per block sum (s - t)^2 / sum t^2 over real tokens and channels, in fp32.

Letters: B batch, T tokens, D width, L compared blocks.
"""

from collections.abc import Sequence
from typing import Any

import torch

from sparse_train import dist
from sparse_train.config import LossConfig
from sparse_train.training.terms.term import LossTerm, ModelOutputs, Ratio

_TINY = torch.finfo(torch.float32).tiny


class FeatureTerm(LossTerm):
    """Each block's sums are taken as soon as both features are there. Padding counts in neither."""

    uses_teacher_logits = False

    def __init__(self, config: LossConfig):
        super().__init__(config)
        self.uses_features = config.feature_weight > 0
        self.errors: list[torch.Tensor] = []
        """Per block sum (s - t)^2, with gradient."""
        self.energies: list[torch.Tensor] = []
        """Per block sum t^2, plus what epsilon adds."""

    def add_features(self, student: torch.Tensor, teacher: torch.Tensor, attend: torch.Tensor) -> None:
        is_real = attend.unsqueeze(-1)
        teacher = teacher.detach()
        self.errors.append(_SquaredError.apply(student, teacher, is_real))
        energy = _energy(teacher.masked_fill(~is_real, 0))
        if self.config.epsilon:
            num_positions = attend.sum() if self.config.epsilon_per == "token" else attend.numel()
            energy = energy + self.config.epsilon * num_positions * teacher.shape[-1]
        self.energies.append(energy)

    def ratio(self, outputs: ModelOutputs) -> Ratio:
        if not self.errors:
            empty = outputs.zero.detach().new_zeros(0)
            return Ratio(empty, empty)
        return Ratio(torch.stack(self.errors), torch.stack(self.energies), minimum=_TINY)


def squarehead(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], attend: torch.Tensor) -> torch.Tensor:
    """Shares (L,) of the SquareHead terms: per block sum (s - t)^2 / sum t^2 over real tokens and channels, in fp32.

    `student`, `teacher`: one (B, T, D) per block; `attend` (B, T) bool. Padding counts in neither sum. The paper's own
    code forms the ratio per micro-batch of a rank and adds 2^-7 below; here it is over all ranks and exact. Collective.
    Raises ValueError where the blocks do not pair.
    """
    if len(student) != len(teacher):
        raise ValueError(f"{len(student)} student layers cannot be paired with {len(teacher)} teacher layers")
    term = FeatureTerm(LossConfig(feature_weight=1.0))
    for s, t in zip(student, teacher, strict=True):
        term.add_features(s, t, attend)
    return torch.stack(term.errors) / dist.sum_over_ranks(torch.stack(term.energies)).clamp(min=_TINY)


class _SquaredError(torch.autograd.Function):
    """Sum over real tokens and channels of (s - t)^2, fp32; s, t (B, T, D), is_real (B, T, 1).

    Keeps s - t in s's dtype for backward and nothing else: autograd's own chain would keep an fp32 copy, and rounding
    before the gradient's factor or after it is the same.
    """

    @staticmethod
    def forward(ctx: Any, s: torch.Tensor, t: torch.Tensor, is_real: torch.Tensor) -> torch.Tensor:
        difference = (s.float() - t.float()).masked_fill_(~is_real, 0)
        ctx.save_for_backward(difference.to(s.dtype))
        return _energy(difference)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        difference, = ctx.saved_tensors
        return difference * (2 * grad).to(difference.dtype), None, None


def _energy(x: torch.Tensor) -> torch.Tensor:
    """Sum of squares, fp32."""
    return torch.linalg.vector_norm(x.float()).square()
