"""The losses of arXiv 2310.06927, as shares of one sum over all ranks.

    total = task_weight * CE + logit_weight * KL(teacher || student) * T^2 + feature_weight * SquareHead

Each term is a ratio whose numerator and denominator are summed over all ranks of the global micro-step, so that it does
not depend on how examples, or the tokens of one example, fall on ranks. A rank's share is its own numerator over the
global denominator; the shares add up to the loss, and so do their gradients. Denominators carry no gradient and are
reduced once per micro-step. `normalise: micro_batch` forms the ratios per rank and means them, as the paper's codes do.

Letters: B batch, T tokens, D width, V vocabulary, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from sparse_train import dist
from sparse_train.config import LossConfig

_TINY = torch.finfo(torch.float32).tiny
_IGNORED = -100


class _SquaredError(torch.autograd.Function):
    """Sum over real tokens and channels of (s - t)^2, fp32; s, t (B, T, D), attend (B, T, 1).

    Keeps s - t in s's dtype for backward and nothing else: autograd's own chain would keep an fp32 copy, and rounding
    before the gradient's factor or after it is the same.
    """

    @staticmethod
    def forward(ctx, s, t, attend):
        difference = (s.float() - t.float()).masked_fill_(~attend, 0)
        ctx.save_for_backward(difference.to(s.dtype))
        return _energy(difference)

    @staticmethod
    def backward(ctx, grad):
        difference, = ctx.saved_tensors
        return difference * (2 * grad).to(difference.dtype), None, None


def _energy(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(x.float()).square()


@dataclass
class FeatureSums:
    """SquareHead's sums of one micro-step on this rank, layer by layer: add() as soon as both features are there."""

    config: LossConfig
    errors: list[torch.Tensor] = field(default_factory=list)
    """Per layer sum (s - t)^2, with gradient."""
    energies: list[torch.Tensor] = field(default_factory=list)
    """Per layer sum t^2, plus what epsilon adds."""

    def add(self, student: torch.Tensor, teacher: torch.Tensor, attend: torch.Tensor) -> None:
        """`student`, `teacher` (B, T, D); `attend` (B, T) bool. Neither feature is kept."""
        real = attend.unsqueeze(-1)
        teacher = teacher.detach()
        self.errors.append(_SquaredError.apply(student, teacher, real))
        energy = _energy(teacher.masked_fill(~real, 0))
        if self.config.epsilon:
            num = attend.sum() if self.config.epsilon_per == "token" else attend.numel()
            energy = energy + self.config.epsilon * num * teacher.shape[-1]
        self.energies.append(energy)


def squarehead(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], attend: torch.Tensor) -> torch.Tensor:
    """Shares (L,) of the SquareHead terms: per layer sum (s - t)^2 / sum t^2 over real tokens and channels, in fp32.

    `student`, `teacher`: one (B, T, D) per layer; `attend` (B, T) bool. Padding counts in neither sum. The paper's own
    code forms the ratio per micro-batch of a rank and adds 2^-7 below; here it is over all ranks and exact.
    """
    if len(student) != len(teacher):
        raise ValueError(f"{len(student)} student layers cannot be paired with {len(teacher)} teacher layers")
    sums = FeatureSums(LossConfig(feature_weight=1.0))
    for s, t in zip(student, teacher, strict=True):
        sums.add(s, t, attend)
    return torch.stack(sums.errors) / dist.sum_over_ranks(torch.stack(sums.energies)).clamp(min=_TINY)


@dataclass(frozen=True)
class Shares:
    """This rank's part of the terms of one micro-step; sums over ranks are the terms."""

    loss: torch.Tensor
    """Scalar with gradient: the weighted sum of the terms below."""
    task: torch.Tensor
    logit: torch.Tensor
    feature: torch.Tensor
    """(L,), or (0,) without feature loss."""

    def detached(self) -> torch.Tensor:
        """(3 + L,): loss, task, logit, feature terms."""
        return torch.cat([torch.stack([self.loss, self.task, self.logit]), self.feature]).detach()


def distillation_loss(config: LossConfig, logits: torch.Tensor, targets: torch.Tensor,
                      features: FeatureSums | None = None, teacher_logits: torch.Tensor | None = None,
                      labels: torch.Tensor | None = None) -> Shares:
    """`logits` (B, T, V), `targets` (B, T), -100 where there is nothing to predict.

    `teacher_logits` (B, T, V) with a logit loss; `labels` (B, T) only where config.logit_tokens is "labelled".
    """
    chosen = targets != _IGNORED
    predicted = logits[chosen].float()
    zero = predicted.sum() * 0  # keeps a rank without targets in the graph, so that its backward takes part
    cross_entropy = functional.cross_entropy(predicted, targets[chosen], reduction="sum") if len(predicted) else zero
    divergence, num_compared = zero.detach(), chosen.sum()
    if config.logit_weight:
        compared = chosen if config.logit_tokens == "predicted" else labels != _IGNORED
        num_compared = compared.sum()
        student = predicted if compared is chosen else logits[compared].float()
        divergence = _divergence(student, teacher_logits[compared].float(), config.temperature)
    numerators = energies = predicted.new_zeros(0)
    if features is not None:
        numerators, energies = torch.stack(features.errors), torch.stack(features.energies)

    denominators = torch.cat([torch.stack([chosen.sum(), num_compared]).to(energies), energies])
    if config.normalise == "global":
        denominators = dist.sum_over_ranks(denominators)
    counts, energies = denominators.split([2, len(energies)])
    num_targets, num_compared = counts.clamp(min=1)
    task, logit, feature = (cross_entropy / num_targets, divergence / num_compared,
                            numerators / energies.clamp(min=_TINY))
    if config.normalise == "micro_batch":
        task, logit, feature = (term / dist.world_size() for term in (task, logit, feature))
    loss = config.task_weight * task + config.logit_weight * logit + config.feature_weight * feature.sum()
    return Shares(loss + zero, task, logit, feature)


def _divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Sum over rows (N, V) of KL(teacher || student) at `temperature`, times T^2 (Hinton et al., arXiv 1503.02531)."""
    return functional.kl_div(functional.log_softmax(student / temperature, -1),
                             functional.log_softmax(teacher.detach() / temperature, -1),
                             reduction="sum", log_target=True) * temperature**2
