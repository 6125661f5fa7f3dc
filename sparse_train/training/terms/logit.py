"""Distillation of the teacher's distribution over the vocabulary: KL divergence (Hinton et al., arXiv 1503.02531), its
reverse, and what lies between them (Agarwal et al., arXiv 2306.13649)."""

import torch
from torch.nn import functional

from sparse_train.config import LossConfig
from sparse_train.tasks.batch import IGNORED
from sparse_train.training.terms.term import LossTerm, ModelOutputs, Ratio


class LogitTerm(LossTerm):
    """divergence(teacher, student) * T^2, at the positions that `logit_tokens` names. Zero where its weight is 0."""

    def __init__(self, config: LossConfig):
        super().__init__(config)
        self.uses_teacher_logits = config.logit_weight > 0

    def ratio(self, outputs: ModelOutputs) -> Ratio:
        if not self.config.logit_weight:
            return Ratio(outputs.zero.detach(), outputs.num_targets)
        return Ratio(self._sum, self._is_compared(outputs).sum())

    def _is_compared(self, rows: ModelOutputs) -> torch.Tensor:
        return rows.is_target if self.config.logit_tokens == "predicted" else rows.labels != IGNORED

    def _sum(self, rows: ModelOutputs) -> torch.Tensor:
        temperature = self.config.temperature
        student = (rows.log_probs if temperature == 1
                   else functional.log_softmax(rows.logits.float() / temperature, -1))
        teacher = functional.log_softmax(rows.teacher_logits.detach().float() / temperature, -1)
        divergences = divergence(teacher, student, self.config.logit_beta)
        return divergences[self._is_compared(rows)].sum() * temperature**2


def divergence(teacher: torch.Tensor, student: torch.Tensor, beta: float) -> torch.Tensor:
    """(R,): the generalised Jensen-Shannon divergence of log-probabilities (R, V), with gradient for `student`.

    With P the teacher's distribution, Q the student's and M = beta P + (1 - beta) Q it is (arXiv 2306.13649, eq. 1)

        beta KL(P || M) + (1 - beta) KL(Q || M)

    which vanishes at both ends: for beta near 0 it is about beta KL(P || Q), for beta near 1 about (1 - beta)
    KL(Q || P). As in TRL's GKDTrainer, beta 0 stands for KL(P || Q) itself and 1 for KL(Q || P), so that a small beta
    is not the limit of a smaller one: its weight must be larger by 1 / beta for the same pull.
    """
    if beta == 0:
        return _kl(teacher, student)
    if beta == 1:
        return _kl(student, teacher)
    mixture = _log_mixture(teacher, student.detach(), beta)
    # M's own gradient adds up to that of the sum of M, which is 1: it is none.
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """(R,): KL(P || Q) of log-probabilities (R, V). What P never says counts 0, whatever Q says of it.

    The sum of Q - P, which is 0, is added: of an error in the normaliser of either, what is left is second order.
    """
    p_probs, q_probs = p.exp(), q.exp()
    return (p_probs * (p - q).masked_fill(p_probs == 0, 0) + (q_probs - p_probs)).sum(-1)


def _log_mixture(teacher: torch.Tensor, student: torch.Tensor, beta: float) -> torch.Tensor:
    """log(beta P + (1 - beta) Q) from log P and log Q; exactly those where they are equal."""
    share = torch.where(teacher < student, teacher.new_full((), beta), 1 - beta)  # the smaller one's
    distance = (teacher - student).abs().nan_to_num()  # where neither says a token
    return torch.maximum(teacher, student) + torch.log1p(share * torch.expm1(-distance))
