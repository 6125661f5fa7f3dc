"""How many parameters a model has before and after it is pruned."""

import math
from dataclasses import dataclass

from transformers import PreTrainedModel

from sparse_train.config import PruneConfig
from sparse_train.models import family_of


@dataclass(frozen=True)
class ParameterCounts:
    total: int
    prunable: int
    """In the linears that are pruned."""
    kept: tuple[int, ...]
    """Of those, at each of config.prune.levels."""


def count_parameters(model: PreTrainedModel, prune: PruneConfig) -> ParameterCounts:
    """Of a model with or without data."""
    linears = family_of(model).prunable_linears(model).values()
    prunable = sum(linear.in_features * linear.out_features for linear in linears)
    return ParameterCounts(sum(math.prod(parameter.shape) for parameter in model.parameters()), prunable,
                           tuple(round((1 - level.sparsity) * prunable) for level in prune.levels))
