"""oBERT, the Optimal BERT Surgeon (Kurtic et al., arXiv 2203.07259): pruning by second-order information of the loss
itself, from the gradients of the model's own training loss.

    F = 1 / m * sum of g_i g_i^T + lambda I     empirical Fisher matrix of m examples, block-diagonal (section 3)
    score of w_q = w_q^2 / (2 [F^-1]_qq)        the lowest go
    the kept weights change by the d that minimises d^T F d, with d = -w at the pruned ones

The last line is the paper's update of a whole set Q, d = -F^-1 E^T (E F^-1 E^T)^-1 E w, with all that a block loses as
Q, as equations in the kept weights. Their code for single weights adds up what each would cause alone, which goes wrong
where many of a block go at once.

All gradients are those of the dense model, as in the paper's one-shot step (backward.py). Further deviations: a
gradient is that of one example's mean loss per target, where training divides by the targets of a whole micro-step;
blocks lie within rows; counts are exact over each layer, where the paper ranks all layers together; lambda is
prune.damping times the mean of a row's diagonal, so that the loss may have any scale; a block is inverted by its
Cholesky factorisation, with ten times the damping where that fails.

Letters: R rows (outputs), C columns (inputs), B weights of a block, N = ceil(C / B) blocks of a row.
"""

import logging

import torch
from torch.nn import functional

from sparse_train import dist
from sparse_train.config import Section
from sparse_train.config.base import Positive
from sparse_train.errors import UserError
from sparse_train.pruning.pattern import keep_best
from sparse_train.pruning.pruner import Layer, Pruner
from sparse_train.pruning.statistics import Gradients

log = logging.getLogger(__name__)
_NUMBERS = 1 << 22  # of the Fisher matrix at a time, if a row has no more: 32 MB, and 160 MB with what is made of it
_CHOLESKY_ATTEMPTS = 5


class ObertOptions(Section):
    """`prune.options` of prune.method=obert."""

    fisher_block_size: Positive = 50
    """B: neighbouring weights of a row whose gradients are seen together; of an N:M pattern as many whole groups as
    fit. Time and memory grow with it, and it needs as many examples for a matrix of full rank. The default is the
    paper's."""


class Obert(Pruner[Gradients]):
    """Collective: each rank has the gradients of its own examples, and their products are summed."""

    Statistics = Gradients
    Options = ObertOptions
    options: ObertOptions

    def prune(self, layer: Layer, statistics: Gradients) -> tuple[torch.Tensor, torch.Tensor]:
        """The updated weight is fp32. Raises UserError, naming the layer, where gradients are missing or not finite.

        The Fisher matrix, B numbers per weight, is computed for some rows at a time, once for the scores and once for
        the values.
        """
        width = _block_width(layer, self.options.fisher_block_size)
        weight = _in_blocks(layer.weight.detach().float(), width)
        step = max(1, _NUMBERS // (weight[0].numel() * width))
        chunks = [slice(start, start + step) for start in range(0, len(weight), step)]
        scores, strongest = torch.empty_like(weight), layer.spec.damping
        for rows in chunks:
            fisher, scale = _fisher(layer, statistics, rows, width)
            lower, damping = _cholesky(fisher, layer)
            strongest = max(strongest, damping)
            inverse = torch.cholesky_inverse(lower)
            scores[rows] = scale * weight[rows].square() / (2 * inverse.diagonal(dim1=-2, dim2=-1))
        if strongest > layer.spec.damping and dist.rank() == 0:
            log.warning("%s: blocks of its Fisher matrix are singular with damping %g; they got up to %g", layer.name,
                        layer.spec.damping, strongest)
        if not scores.any() and weight.any():
            raise UserError(f"no gradient of the loss reaches {layer.name}; give more or shorter examples "
                            f"(prune.num_calibration, task.max_length), or {self.without_inputs}")
        num_columns = layer.weight.shape[1]
        keep = keep_best(scores.flatten(1)[:, :num_columns], layer)
        kept, values = _in_blocks(keep.float(), width), torch.empty_like(weight)
        for rows in chunks:
            fisher, _ = _fisher(layer, statistics, rows, width)
            values[rows] = _update(weight[rows], kept[rows], fisher, layer)
        return values.flatten(1)[:, :num_columns].contiguous(), keep


def _block_width(layer: Layer, size: int) -> int:
    group = layer.spec.group[1] if layer.spec.group else 1
    return max(group, min(size, layer.weight.shape[1]) // group * group)


def _in_blocks(matrix: torch.Tensor, width: int) -> torch.Tensor:
    """(..., C) -> (..., N, B), zeros behind the last column."""
    return functional.pad(matrix, (0, -matrix.shape[-1] % width)).unflatten(-1, (-1, width))


def _fisher(layer: Layer, gradients: Gradients, rows: slice, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(F (rows, N, B, B), scale (rows, 1, 1)), where F is divided by `scale`, the mean of a row's diagonal before
    damping; 0 where no gradient reaches a row. Collective.

    As of every statistic, products are fp32, batch by batch, and sums fp64.
    """
    weight = _in_blocks(layer.weight[rows], width)
    total = weight.new_zeros(*weight.shape, width, dtype=torch.float64)
    for of_examples in gradients.of_rows(rows):
        if layer.earlier is not None:  # what an earlier level dropped does not move
            of_examples = of_examples * layer.earlier[rows]
        g = _in_blocks(of_examples, width).permute(1, 2, 3, 0)
        total += g @ g.mT
    dist.sum_over_ranks(total)  # 1 / m is part of the scale, and scores are compared within a layer
    scale = total.diagonal(dim1=-2, dim2=-1).sum((1, 2), keepdim=True) / layer.weight.shape[1]
    if not (torch.isfinite(scale).all() and torch.isfinite(weight).all()):
        raise UserError(f"{layer.name}: its weight or a gradient of it is not finite; the dense model is damaged or "
                        "overflows")
    total /= torch.where(scale > 0, scale, 1)[..., None]
    total.diagonal(dim1=-2, dim2=-1).add_(layer.spec.damping)
    return total.float(), scale.float()


def _update(weight: torch.Tensor, kept: torch.Tensor, fisher: torch.Tensor, layer: Layer) -> torch.Tensor:
    """The values (rows, N, B) that are best beside the zeros where `kept` is 0."""
    pruned = 1 - kept
    equations = fisher * kept[..., None] * kept[..., None, :] + torch.diag_embed(pruned)
    pull = kept[..., None] * (fisher @ (weight * pruned)[..., None])
    change = torch.cholesky_solve(pull, _cholesky(equations, layer)[0])[..., 0]
    return (weight + change) * kept


def _cholesky(matrices: torch.Tensor, layer: Layer) -> tuple[torch.Tensor, float]:
    """(lower factors, the strongest damping of any). Each of `matrices` that is singular gets ten times the damping, in
    place, until it is not; raises UserError, naming the layer, where one stays so."""
    damping = layer.spec.damping
    for _ in range(_CHOLESKY_ATTEMPTS):
        lower, failed = torch.linalg.cholesky_ex(matrices)
        if not failed.any():
            return lower, damping
        tried, damping = damping, 10 * damping
        matrices.diagonal(dim1=-2, dim2=-1).add_((damping - tried) * (failed > 0)[..., None])
    raise UserError(f"{layer.name}: a block of its Fisher matrix is singular even with damping {tried:g}; raise "
                    "prune.num_calibration or prune.damping")
