"""The losses of arXiv 2310.06927, as shares of one sum over all ranks.

    total = task_weight * CE + logit_weight * KL(teacher || student) * T^2 + feature_weight * SquareHead

Each term is a ratio whose numerator and denominator are summed over all ranks of the global micro-step, so that it does
not depend on how examples fall on ranks. A rank's share is its own numerator over the global denominator; the shares
add up to the loss, and so do their gradients. Denominators carry no gradient and are reduced once per micro-step.

Letters: B batch, T tokens, D width, V vocabulary, L layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from sparse_train import dist
from sparse_train.config import LossConfig

_TINY = torch.finfo(torch.float32).tiny


def squarehead(student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor],
               attend: torch.Tensor) -> torch.Tensor:
    """Shares (L,) of the SquareHead terms: per layer sum (s - t)^2 / sum t^2 over real tokens and channels, in fp32.

    `student`, `teacher`: one (B, T, D) per layer; `attend` (B, T) bool. Padding counts in neither sum. The paper's own
    code forms the ratio per micro-batch of a rank and adds 2^-7 below; here it is over all ranks and exact.
    """
    numerators, energies = _squarehead_sums(student, teacher, attend)
    return numerators / dist.sum_over_ranks(energies).clamp(min=_TINY)


def _squarehead_sums(student, teacher, attend):
    """Two tensors (L,): squared error, with gradient, and the teacher's energy, without."""
    if len(student) != len(teacher):
        raise ValueError(f"{len(student)} student layers cannot be paired with {len(teacher)} teacher layers")
    errors, energies = [], []
    for s_btd, t_btd in zip(student, teacher, strict=True):
        t = t_btd.detach()[attend].float()
        errors.append((s_btd[attend].float() - t).square().sum())
        energies.append(t.square().sum())
    return torch.stack(errors), torch.stack(energies)


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


def distillation_loss(config: LossConfig, student_logits: torch.Tensor, labels: torch.Tensor, attend: torch.Tensor,
                      student_features: Sequence[torch.Tensor] = (), teacher_features: Sequence[torch.Tensor] = (),
                      teacher_logits: torch.Tensor | None = None) -> Shares:
    """`labels` (B, T), -100 where there is no target, aligned with the input: position t is predicted from t - 1."""
    targets = labels[:, 1:]
    chosen = targets != -100
    logits = student_logits[:, :-1][chosen].float()
    zero = logits.sum() * 0  # keeps a rank without targets in the graph, so that its backward takes part
    cross_entropy = functional.cross_entropy(logits, targets[chosen], reduction="sum") if len(logits) else zero
    divergence = zero.detach()
    if config.logit_weight and len(logits):
        divergence = _divergence(logits, teacher_logits[:, :-1][chosen].float(), config.temperature)
    numerators = energies = logits.new_zeros(0)
    if config.feature_weight:
        numerators, energies = _squarehead_sums(student_features, teacher_features, attend)

    denominators = torch.cat([chosen.sum().to(energies)[None], energies])
    num_targets, energies = dist.sum_over_ranks(denominators).split([1, len(energies)])
    num_targets = num_targets[0].clamp(min=1)
    task, logit, feature = cross_entropy / num_targets, divergence / num_targets, numerators / energies.clamp(min=_TINY)
    loss = config.task_weight * task + config.logit_weight * logit + config.feature_weight * feature.sum()
    return Shares(loss + zero, task, logit, feature)


def _divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Sum over rows (N, V) of KL(teacher || student) at `temperature`, times T^2 (Hinton et al., arXiv 1503.02531)."""
    return functional.kl_div(functional.log_softmax(student / temperature, -1),
                             functional.log_softmax(teacher.detach() / temperature, -1),
                             reduction="sum", log_target=True) * temperature**2
