"""SquareHead (arXiv 2310.06927): per block sum (s - t)^2 / sum t^2 over real tokens and channels, in fp32; and the same
ratio over less than a block (`feature_ratio`).

Letters: B batch, T tokens, D width, L compared blocks.
"""

from collections.abc import Sequence
from typing import Any

import torch

from sparse_train import dist
from sparse_train.config import LossConfig
from sparse_train.training.terms.term import LossTerm, ModelOutputs, Ratio

_TINY = torch.finfo(torch.float32).tiny
_SUMMED = {"block": None, "typical": -1, "token": -1, "channel": (0, 1)}
"""`feature_ratio` -> the dimensions of (B, T, D) that an error and an energy are sums over; None: all of them."""
_MASSIVE = 10.0
"""A token whose norm is over this many times the geometric mean of the block's is left out by `typical`."""


class FeatureTerm(LossTerm):
    """Each block's sums are taken as soon as both features are there. Padding counts in neither."""

    uses_teacher_logits = False

    def __init__(self, config: LossConfig):
        super().__init__(config)
        self.uses_features = config.feature_weight > 0
        self.errors: list[torch.Tensor] = []
        """Per block sums of (s - t)^2, with gradient: scalar, (B, T) or (D,)."""
        self.energies: list[torch.Tensor] = []
        """Per block sums of t^2, plus what epsilon adds, of the same shape."""
        self.attends: list[torch.Tensor] = []
        """Per block (B, T) bool: real tokens."""

    def add_features(self, student: torch.Tensor, teacher: torch.Tensor, attend: torch.Tensor) -> None:
        is_real, summed = attend.unsqueeze(-1), _SUMMED[self.config.feature_ratio]
        teacher = teacher.detach()
        self.errors.append(_SquaredError.apply(student, teacher, is_real, summed))
        energy = _energy(teacher.masked_fill(~is_real, 0), summed)
        if self.config.epsilon:
            num_positions = attend.sum() if self.config.epsilon_per == "token" else attend.numel()
            num_entries = {None: num_positions * teacher.shape[-1], -1: teacher.shape[-1], (0, 1): num_positions}
            energy = energy + self.config.epsilon * num_entries[summed]
        self.energies.append(energy)
        self.attends.append(attend)

    def ratio(self, outputs: ModelOutputs) -> Ratio:
        if not self.errors:
            empty = outputs.zero.detach().new_zeros(0)
            return Ratio(empty, empty)
        if self.config.feature_ratio == "token":
            # Padding has neither error nor energy.
            ratios = [(error / energy.masked_fill(~attend, 1).clamp(min=_TINY)).sum()
                      for error, energy, attend in zip(self.errors, self.energies, self.attends, strict=True)]
            return Ratio(torch.stack(ratios), torch.stack([attend.sum() for attend in self.attends]))
        if self.config.feature_ratio == "typical":
            self._sum_typical_tokens()
        errors, energies = torch.stack(self.errors), torch.stack(self.energies)
        return Ratio(errors / errors[0].numel(), energies, minimum=_TINY)

    def _sum_typical_tokens(self) -> None:
        """Collective, except where ratios are formed per micro-batch."""
        logs = torch.stack([energy.clamp(min=_TINY).log()[attend].sum()
                            for energy, attend in zip(self.energies, self.attends, strict=True)])
        counts = torch.stack([attend.sum() for attend in self.attends]).to(logs.dtype)
        if self.config.normalise == "global":
            logs, counts = dist.sum_over_ranks(torch.stack([logs, counts]))
        limits = (logs / counts.clamp(min=1)).exp() * _MASSIVE**2
        for block, limit in enumerate(limits):
            typical = self.attends[block] & (self.energies[block] <= limit)
            self.errors[block] = self.errors[block][typical].sum()
            self.energies[block] = self.energies[block][typical].sum()


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


_Dimensions = int | tuple[int, ...] | None


class _SquaredError(torch.autograd.Function):
    """(s - t)^2 at real tokens, summed over dimensions, fp32; s, t (B, T, D), is_real (B, T, 1).

    Keeps s - t in s's dtype for backward and nothing else: autograd's own chain would keep an fp32 copy, and rounding
    before the gradient's factor or after it is the same.
    """

    @staticmethod
    def forward(ctx: Any, s: torch.Tensor, t: torch.Tensor, is_real: torch.Tensor, summed: _Dimensions) -> torch.Tensor:
        difference = (s.float() - t.float()).masked_fill_(~is_real, 0)
        ctx.save_for_backward(difference.to(s.dtype))
        ctx.per_token = summed == -1
        return _energy(difference, summed)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        difference, = ctx.saved_tensors
        factor = (2 * grad).to(difference.dtype)
        return difference * (factor.unsqueeze(-1) if ctx.per_token else factor), None, None, None


def _energy(x: torch.Tensor, summed: _Dimensions) -> torch.Tensor:
    """Sum of squares over dimensions, fp32."""
    return torch.linalg.vector_norm(x.float(), dim=summed).square()
