"""The terms of a loss, a file each. sparse_train/registry.py lists them, sparse_train/training/losses.py sums them."""

from sparse_train.training.terms.term import LossTerm, ModelOutputs, Ratio

__all__ = ["LossTerm", "ModelOutputs", "Ratio"]
