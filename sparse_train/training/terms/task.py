"""The task's own loss: cross-entropy of the targets."""

import torch
from torch.nn import functional

from sparse_train.tasks.batch import IGNORED
from sparse_train.training.terms.term import LossTerm, ModelOutputs, Ratio


class TaskTerm(LossTerm):
    """Computed whatever its weight, since it is logged."""

    uses_teacher_logits = False

    def ratio(self, outputs: ModelOutputs) -> Ratio:
        return Ratio(_cross_entropy, outputs.num_targets)


def _cross_entropy(rows: ModelOutputs) -> torch.Tensor:
    return functional.nll_loss(rows.log_probs, rows.targets, ignore_index=IGNORED, reduction="sum")
