"""Wanda (Sun et al., arXiv 2306.11695): the largest |w_ij| * ||x_j||_2 of each row survive, unchanged.

||x_j||_2 is the norm of input j over all real calibration tokens. Counts are exact over the layer: where the rows do
not divide them, those rows keep one more weight than the others whose next score is the largest.
"""

import torch

from sparse_train.pruning.pattern import keep_best, keep_largest_per_row
from sparse_train.pruning.pruner import Layer, Pruner
from sparse_train.pruning.statistics import ColumnNorms


class Wanda(Pruner[ColumnNorms]):
    Statistics = ColumnNorms

    def prune(self, layer: Layer, statistics: ColumnNorms) -> tuple[torch.Tensor, torch.Tensor]:
        layer.require_finite(statistics)
        keep = keep_best(layer.weight.abs().float() * statistics.norms(), layer, keep_largest_per_row)
        return layer.weight * keep, keep
