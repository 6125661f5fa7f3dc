"""Fine-tuning under ZeRO: losses, engines, the loop, checkpoints."""

from sparse_train.training.engine import gathered_tensors
from sparse_train.training.loop import Outcome, train
from sparse_train.training.losses import squarehead

__all__ = ["Outcome", "gathered_tensors", "squarehead", "train"]
