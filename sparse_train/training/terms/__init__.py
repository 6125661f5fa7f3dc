"""The terms of a loss, a file each. The table is LOSS_TERMS of sparse_train/registry.py; losses.py adds them up."""

from sparse_train.training.terms.term import LossTerm, ModelOutputs, Ratio, RowSum

__all__ = ["LossTerm", "ModelOutputs", "Ratio", "RowSum"]
