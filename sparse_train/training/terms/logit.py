"""Distillation of the teacher's distribution over the vocabulary (Hinton et al., arXiv 1503.02531)."""

import torch
from torch.nn import functional

from sparse_train.config import LossConfig
from sparse_train.tasks.batch import IGNORED
from sparse_train.training.terms.term import LossTerm, ModelOutputs, Ratio


class LogitTerm(LossTerm):
    """KL(teacher || student) * T^2, at the positions that `logit_tokens` names. Zero where its weight is 0."""

    def __init__(self, config: LossConfig):
        super().__init__(config)
        self.uses_teacher_logits = config.logit_weight > 0

    def ratio(self, outputs: ModelOutputs) -> Ratio:
        if not self.config.logit_weight:
            return Ratio(outputs.zero.detach(), outputs.num_targets)
        if self.config.logit_tokens == "predicted":
            compared, student = outputs.is_target, outputs.predictions
        else:
            compared = outputs.labels != IGNORED
            student = outputs.logits[compared].float()
        teacher = outputs.teacher_logits[compared].float()
        return Ratio(_divergence(student, teacher, self.config.temperature), compared.sum())


def _divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Sum over rows (N, V) of KL(teacher || student) at `temperature`, times its square."""
    return functional.kl_div(functional.log_softmax(student / temperature, -1),
                             functional.log_softmax(teacher.detach() / temperature, -1),
                             reduction="sum", log_target=True) * temperature**2
