"""Magnitude pruning: the weights with the largest |w| of a layer survive, unchanged."""

import torch

from sparse_train.pruning.pattern import keep_best
from sparse_train.pruning.pruner import Layer, Pruner


class Magnitude(Pruner[None]):
    def prune(self, layer: Layer, statistics: None = None) -> tuple[torch.Tensor, torch.Tensor]:
        keep = keep_best(layer.weight.abs().float(), layer)
        return layer.weight * keep, keep
