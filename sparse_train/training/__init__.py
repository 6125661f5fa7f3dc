"""Fine-tuning under ZeRO: loss terms, engines, the step and the loop, checkpoints."""

from sparse_train.training.bits import audit
from sparse_train.training.gather import gathered_tensors
from sparse_train.training.loading import load_student, load_teacher
from sparse_train.training.loop import Outcome, train
from sparse_train.training.run import Hooks, TrainingRun
from sparse_train.training.terms.feature import squarehead

__all__ = [
    "Hooks", "Outcome", "TrainingRun", "audit", "gathered_tensors", "load_student", "load_teacher", "squarehead",
    "train",
]
