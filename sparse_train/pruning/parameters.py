"""How many parameters a model has before and after it is pruned."""

import math
from dataclasses import dataclass

from transformers import PreTrainedModel

from sparse_train.config import PruneConfig
from sparse_train.models import family_of
from sparse_train.pruning.layers import choose_layers, num_kept


@dataclass(frozen=True)
class ParameterCounts:
    total: int
    prunable: int
    """In the linears that are pruned."""
    kept: tuple[int, ...]
    """Of those, at each of config.prune.levels."""


def count_parameters(model: PreTrainedModel, prune: PruneConfig) -> ParameterCounts:
    """Of a model with or without data. Raises UserError where `prune` does not fit its linears (see choose_layers)."""
    shapes = {name: (linear.out_features, linear.in_features)
              for name, linear in family_of(model).prunable_linears(model).items()}
    levels = [choose_layers(shapes, level) for level in prune.levels]
    return ParameterCounts(
        sum(math.prod(parameter.shape) for parameter in model.parameters()),
        sum(math.prod(shapes[name]) for name in levels[0]),
        tuple(sum(num_kept(math.prod(shapes[name]), layer.sparsity) for name, layer in layers.items())
              for layers in levels))
