"""Rounding that compensates its errors, by the sweep that prunes (GPTQ, arXiv 2210.17323; SparseGPT, arXiv 2301.00774,
section 3.5). The bits stay as they are.

    scales                 those of rounding to nearest; they are fixed first
    compensate             column by column: a kept weight becomes its nearest code times its scale, a pruned one 0, and
                           the error moves to the columns to the right
    refine                 kept weights once more, each given all others: code of q_j + [H (w - q)]_j / H_jj
                           (coordinate descent, as QuantEase, arXiv 2309.01885)

The first one spreads errors over pruned positions as well, and what ends there is lost. The second one moves kept
weights alone, and no step of it makes (w - q)^T H (w - q) larger.
"""

from collections.abc import Callable, Iterable

import torch
from transformers import PreTrainedModel

from sparse_train import kernels
from sparse_train.compress.quantise import QUANTISERS, Codes, Quantiser
from sparse_train.config import PruneLevel
from sparse_train.models import family_of
from sparse_train.pruning import Layer, prune_layers
from sparse_train.pruning.compensation import CompensatingPruner, compensate
from sparse_train.pruning.statistics import Hessian
from sparse_train.sparse import BitmaskTensor, densify, sparse_linears
from sparse_train.tasks import Batch

_WIDTH = 128  # columns whose errors reach the others in one product
_NUM_REFINEMENTS = 3


def round_compensated(model: PreTrainedModel, batches: Iterable[Batch], precision: str, damping: float,
                      progress: Callable[[int, int], None] | None = None) -> dict[str, Codes]:
    """Codes of every sparse weight, by module name, rounded block by block: the inputs of a block are computed by the
    rounded blocks before it. `precision`: int8 or int4.

    `model` has SparseLinears, which become linears with the rounded weights. `batches` are on its device. `damping`:
    as prune.damping. Raises UserError where no token reaches a layer.
    """
    keeps = {name: linear.weight.keep for name, linear in sparse_linears(model).items()}
    rounding, level = Rounding(QUANTISERS[precision]), PruneLevel(sparsity=0.0, damping=damping)
    num_blocks = len(family_of(model).blocks(model))
    specs = dict.fromkeys(keeps, level)
    for done, _ in enumerate(prune_layers(densify(model), rounding, specs, batches, keeps.get), 1):
        if progress:
            progress(done, num_blocks)
    return rounding.rounded


class Rounding(CompensatingPruner):
    """`prune` rounds a layer's kept weights, those of `layer.earlier`, and leaves codes and scales in `rounded`."""

    without_inputs = "use compress.rounding=nearest"

    def __init__(self, quantiser: Quantiser):
        super().__init__()
        self.quantiser = quantiser
        self.rounded: dict[str, Codes] = {}

    def prune(self, layer: Layer, statistics: Hessian) -> tuple[torch.Tensor, torch.Tensor]:
        assert layer.earlier is not None
        damping, upper, dead = self.factor(layer, statistics)
        hessian = statistics.mean()
        hessian.diagonal()[dead] = 1
        hessian.diagonal().add_(damping)
        nearest, scale = self.quantiser.nearest(BitmaskTensor.from_dense(layer.weight.cpu(), layer.earlier.cpu()))
        weight = layer.weight.float().T.contiguous()
        keep = layer.earlier.T.contiguous()
        steps = _step_of_columns(scale, len(weight)).to(weight.device)
        lowest, highest = self.quantiser.lowest, self.quantiser.highest

        def rounded(values: torch.Tensor, column: int) -> torch.Tensor:
            codes = values.div(steps[column]).round_().clamp_(lowest, highest)
            return codes.mul_(steps[column]).mul_(keep[column])

        columns = weight.clone()
        compensate(columns, upper, _WIDTH, lambda column: rounded(columns[column], column))
        for _ in range(_NUM_REFINEMENTS):
            _refine(columns, weight, hessian, rounded)
        codes = columns.div(steps).round_().to(torch.int8).T.cpu()
        self.rounded[layer.name] = BitmaskTensor(codes[layer.earlier.cpu()], nearest.bitmask, nearest.shape), scale
        return columns.T, layer.earlier


def _step_of_columns(scale: torch.Tensor, num_columns: int) -> torch.Tensor:
    """(C, R) float32: what a code of each column stands for."""
    return scale.expand(num_columns, -1) if scale.ndim == 1 else kernels.scale_of_columns(scale, num_columns).T


def _refine(columns: torch.Tensor, weight: torch.Tensor, hessian: torch.Tensor,
            rounded: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
    """Give each of `columns` (C, R), in order, the best codes beside those of all others; `weight` (C, R) is what they
    stand for."""
    errors = weight - columns
    for start in range(0, len(columns), _WIDTH):
        block = slice(start, start + _WIDTH)
        pulls = hessian[block] @ errors
        for place, pull in enumerate(pulls):
            column = start + place
            best = rounded(columns[column] + pull / hessian[column, column], column)
            change = columns[column] - best
            columns[column] = best
            errors[column] += change
            pulls[place + 1:].addr_(hessian[block, column][place + 1:], change)
