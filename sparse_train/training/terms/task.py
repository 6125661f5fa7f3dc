"""The task's own loss: cross-entropy of the targets."""

from torch.nn import functional

from sparse_train.training.terms.term import LossTerm, ModelOutputs, Ratio


class TaskTerm(LossTerm):
    """Computed whatever its weight, since it is logged."""

    uses_teacher_logits = False

    def ratio(self, outputs: ModelOutputs) -> Ratio:
        predictions, targets = outputs.predictions, outputs.targets[outputs.is_target]
        if not len(predictions):
            return Ratio(outputs.zero, outputs.num_targets)
        return Ratio(functional.cross_entropy(predictions, targets, reduction="sum"), outputs.num_targets)
