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
from collections.abc import Callable, Mapping, Sequence

import torch

from sparse_train.config import PruneLevel
from sparse_train.errors import UserError
from sparse_train.pruning.layers import num_kept
from sparse_train.pruning.pruner import Layer
from sparse_train.pruning.statistics import ColumnNorms

_BISECTIONS = 100  # halve an interval until float64 cannot


class InputNorms:
    """What outlier_share reads of a block's inputs."""

    Statistics = ColumnNorms
    without_inputs = "use prune.allocation=atp or uniform"


def allocate(specs: Mapping[str, PruneLevel], sizes: Mapping[str, int], blocks: Sequence[str], level: PruneLevel,
             shares: Mapping[str, float], num_alive: Callable[[str], int | None]) -> dict[str, PruneLevel]:
    """`specs` of the linears with sparsities of their own.

    `sizes`: number of weights by name. `blocks`: names of the model's blocks as it runs them; those without a linear do
    not count. `shares`: outlier_share by block, read by owl alone. `num_alive`: how many weights of a linear an earlier
    level of a chain left; None: all. Raises UserError where the spread leaves nothing of a block: with owl, one that
    has far fewer outliers than most lies up to 2 * spread below them.
    """
    members = {block: [name for name in specs if name.startswith(f"{block}.")] for block in blocks}
    members = {block: names for block, names in members.items() if names}
    needs = [shares[block] if level.allocation == "owl" else -float(index) for index, block in enumerate(members)]
    unit = 2 * level.allocation_spread / ((max(needs) - min(needs)) or 1)
    names = [name for block in members.values() for name in block]
    alive = [num_alive(name) for name in names]
    uniform = {name: num_kept(sizes[name], level.sparsity) for name in names}
    counts = dict(zip(names, _divide(
        sum(uniform.values()), [sizes[name] for name in names],
        [unit * need for need, block in zip(needs, members.values(), strict=True) for _ in block],
        [sizes[name] if most is None else most for name, most in zip(names, alive, strict=True)]), strict=True))
    for prefix, block in members.items():
        if all(counts[name] == 1 < uniform[name] for name in block):  # the least that a linear may have
            raise UserError(f"prune.allocation={level.allocation} with prune.allocation_spread="
                            f"{level.allocation_spread:g} leaves nothing of {prefix} at sparsity {level.sparsity:g}; "
                            "choose a smaller spread")
    return {name: specs[name].model_copy(update={"sparsity": 1 - counts[name] / sizes[name]}) for name in names}


def outlier_share(block: Sequence[Layer], statistics: Mapping[str, ColumnNorms], factor: float) -> float:
    """Of all weights of a block, those whose score is over `factor` times the mean score. Inputs count by their root
    mean square: the paper's norm is this times a number that is the same for all linears which see the same tokens."""
    scores = []
    for layer in block:
        inputs = statistics[layer.name]
        layer.require_finite(inputs)
        scores.append(layer.weight.abs().float() * (inputs.norms() / math.sqrt(inputs.num_tokens)))
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
