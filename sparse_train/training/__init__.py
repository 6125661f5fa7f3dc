"""Fine-tuning under ZeRO: losses, engines, the loop, checkpoints."""

from sparse_train.training.engine import audit, gathered_tensors, load_student, load_teacher
from sparse_train.training.loop import Outcome, train
from sparse_train.training.losses import squarehead

__all__ = [
    "Outcome", "audit", "gathered_tensors", "load_student", "load_teacher", "squarehead", "train",
]
