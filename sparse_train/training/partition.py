"""How ZeRO-3 cuts a parameter: flattened, in as many equal parts as there are ranks, the last ones short.

That rule is all that loading, checkpoints and memory planning need, so it can be tried for any number of ranks.
"""

# Bytes per trained value.
WEIGHT_BYTES = {"fp32": 4, "bf16": 2}
MASTER_BYTES, MOMENT_BYTES, GRADIENT_BYTES = 4, 8, 4  # fp32: the copy that is updated, two moments, gradients


def shard_bounds(numel: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """First entry and the one past the last of `rank`'s part; the same number twice where there is nothing left."""
    size = -(-numel // num_ranks)
    return min(numel, size * rank), min(numel, size * (rank + 1))
