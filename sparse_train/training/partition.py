"""How ZeRO-3 cuts a parameter: flattened, in as many equal parts as there are ranks, the last ones short.

That rule is all that loading, checkpoints and memory planning need, so it can be tried for any number of ranks.
"""

from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from sparse_train.models import family_of

# Bytes per trained value.
WEIGHT_BYTES = {"fp32": 4, "bf16": 2}
MASTER_BYTES, MOMENT_BYTES, GRADIENT_BYTES = 4, 8, 4  # fp32: the copy that is updated, two moments, gradients


def part(numel: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """First entry and the one past the last of `rank`'s part; empty where there is nothing left."""
    size = -(-numel // num_ranks)
    return min(numel, size * rank), min(numel, size * (rank + 1))


def sparse_sizes(model: PreTrainedModel, sparsity: float) -> tuple[dict[str, int], dict[str, int]]:
    """(trained parameter -> entries, sparse weight -> bytes of its bits) of a dense `model`, on the meta device too."""
    linears = family_of(model).prunable_linears(model)
    values, bits = {}, {}
    for name, parameter in model.named_parameters():
        linear = linears.get(name.removesuffix(".weight"))
        if linear is None:
            values[name] = parameter.numel()
        else:
            rows, columns = parameter.shape
            values[name] = round((1 - sparsity) * rows * columns)
            bits[name] = rows * 8 * -(-columns // 64)
    return values, bits


def entries_per_rank(sizes: Mapping[str, int], num_ranks: int) -> torch.Tensor:
    """(num_ranks,) entries that each rank owns. Raises ValueError where one has no owner or two."""
    owned = torch.zeros(num_ranks, dtype=torch.long)
    for name, numel in sizes.items():
        parts = torch.tensor([part(numel, rank, num_ranks) for rank in range(num_ranks)])
        if parts[0, 0] != 0 or parts[-1, 1] != numel or not torch.equal(parts[1:, 0], parts[:-1, 1]):
            raise ValueError(f"{name}: the parts of {num_ranks} ranks do not cover its {numel} entries once")
        owned += parts[:, 1] - parts[:, 0]
    return owned
