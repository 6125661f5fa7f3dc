"""How a level's sparsity is divided over the blocks of a model, whose linears share the sparsity of their block.

    owl   density grows with the share of outliers: weights with |w_ij| * |x_j| over M times the block's mean
          (Outlier Weighed Layerwise sparsity, Yin et al., arXiv 2310.05175, section 3.2)
    atp   density falls in equal steps from the first block to the last (Huang et al., arXiv 2502.14770)

In both, a number says how much a block needs. Scaled, so that the largest and the smallest are 2 * spread apart, and
shifted, all by as much as meets the budget, these numbers are the blocks' densities. The budget is exact: as many
weights as with the same sparsity in every block. Where a linear has fewer weights left, because an earlier level of a
chain dropped the others, the rest keep more.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from sparse_train.config import PruneLevel
from sparse_train.pruning.layers import num_kept
from sparse_train.pruning.pruner import Layer, Pruner
from sparse_train.pruning.statistics import ColumnNorms

_BISECTIONS = 100  # halve an interval until float64 cannot


class InputNorms(Pruner[ColumnNorms]):
    """Prunes nothing, and leaves in `norms` what reaches each linear."""

    Statistics = ColumnNorms
    without_inputs = "use prune.allocation=atp or uniform"

    def __init__(self) -> None:
        super().__init__()
        self.norms: dict[str, torch.Tensor] = {}
        """By name: the root mean square (C,) of each input over real tokens. The paper's norm is this times a number
        that is the same for all linears which see the same tokens."""

    def prune(self, layer: Layer, statistics: ColumnNorms) -> tuple[torch.Tensor, torch.Tensor]:
        """The weight as it is. Nobody reads the bits, which are empty so that they take no memory."""
        layer.require_finite(statistics)
        self.norms[layer.name] = statistics.norms() / math.sqrt(statistics.num_tokens)
        return layer.weight, torch.zeros_like(layer.weight, dtype=torch.bool)


def allocate(layers: Sequence[Layer], blocks: Sequence[str], level: PruneLevel,
             norms: Mapping[str, torch.Tensor]) -> list[Layer]:
    """`layers` with sparsities of their own. `blocks`: names of the model's blocks as it runs them; those without a
    layer do not count. `norms`: of InputNorms, read by owl alone."""
    members = [[layer for layer in layers if layer.name.startswith(f"{block}.")] for block in blocks]
    members = [block for block in members if block]
    if level.allocation == "owl":
        needs = [outlier_share(block, norms, level.outlier_factor) for block in members]
    else:
        needs = [-float(index) for index in range(len(members))]
    unit = 2 * level.allocation_spread / ((max(needs) - min(needs)) or 1)
    layers = [layer for block in members for layer in block]
    sizes = [layer.weight.numel() for layer in layers]
    counts = _divide(sum(num_kept(size, level.sparsity) for size in sizes), sizes,
                     [unit * need for need, block in zip(needs, members, strict=True) for _ in block],
                     [size if layer.earlier is None else int(layer.earlier.sum())
                      for size, layer in zip(sizes, layers, strict=True)])
    return [replace(layer, spec=layer.spec.model_copy(update={"sparsity": 1 - count / size}))
            for layer, count, size in zip(layers, counts, sizes, strict=True)]


def outlier_share(block: Sequence[Layer], norms: Mapping[str, torch.Tensor], factor: float) -> float:
    """Of all weights of a block, those whose score is over `factor` times the mean score."""
    scores = [layer.weight.abs().float() * norms[layer.name] for layer in block]
    size = sum(score.numel() for score in scores)
    threshold = factor * sum(score.sum(dtype=torch.float64).item() for score in scores) / size
    return sum(int((score > threshold).sum()) for score in scores) / size


def _divide(budget: int, sizes: Sequence[int], densities: Sequence[float], most: Sequence[int]) -> list[int]:
    """Whole numbers in [1, most] that sum up to `budget`, as near as can be to (density + shift) * size with one shift
    for all. What is left after rounding down goes to the largest remainders, of equal ones to the first."""
    def shares(shift: float) -> list[float]:
        return [min(max((density + shift) * size, 1.0), float(bound))
                for density, size, bound in zip(densities, sizes, most, strict=True)]

    low, high = -max(densities), 1 - min(densities)  # all have the least, all have the most
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if math.fsum(shares(middle)) <= budget else (low, middle)
    exact = shares(low)
    counts = [int(share) for share in exact]
    can_grow = [index for index, count in enumerate(counts) if count < most[index]]
    for index in sorted(can_grow, key=lambda index: counts[index] - exact[index])[:budget - sum(counts)]:
        counts[index] += 1
    return counts
