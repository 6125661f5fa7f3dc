"""The weighted terms of a loss, as shares of one sum over all ranks.

    total = task_weight * CE + logit_weight * D(teacher, student) * T^2 + feature_weight * SquareHead + ...

Each term is a ratio whose numerator and denominator are summed over all ranks of the global micro-step, so that it does
not depend on how examples, or the tokens of one example, fall on ranks. A rank's share is its own numerator over the
global denominator; the shares add up to the loss, and so do their gradients. Denominators carry no gradient and are
reduced once per micro-step. `normalise: micro_batch` forms the ratios per rank and means them, as the paper's codes do
(arXiv 2310.06927).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sparse_train import dist
from sparse_train.config import LossConfig
from sparse_train.registry import LOSS_TERMS
from sparse_train.training.terms import LossTerm, ModelOutputs, RowSum

_CHUNK = 1 << 20
"""Logits that are made fp32 at a time, 4 MB: a CPU's caches hold what the terms compute of them."""


@dataclass(frozen=True)
class Shares:
    """This rank's part of the terms of one micro-step; sums over ranks are the terms."""

    loss: torch.Tensor
    """Scalar with gradient: the weighted sum of the terms below."""
    terms: dict[str, torch.Tensor]
    """By the terms' names, unweighted: scalars, or (L,) for a term of L parts. Those of logits have no gradient of
    their own."""

    def detached(self) -> "Shares":
        return Shares(self.loss.detach(), {name: term.detach() for name, term in self.terms.items()})


def new_terms(config: LossConfig) -> dict[str, LossTerm]:
    """The terms of one micro-step by name, in the order of `config.weights`."""
    return {name: LOSS_TERMS.load(name)(config) for name in config.weights}


def weighted_loss(config: LossConfig, terms: Mapping[str, LossTerm], outputs: ModelOutputs) -> Shares:
    """This rank's share of the loss, whose backward pass can run once. Collective: every rank must call it with the
    same terms."""
    ratios = {name: term.ratio(outputs) for name, term in terms.items()}
    denominators = torch.cat([ratio.denominators.reshape(-1).to(torch.float32) for ratio in ratios.values()])
    if config.normalise == "global":
        denominators = dist.sum_over_ranks(denominators)
    divisors = dict(zip(ratios, denominators.split([ratio.denominators.numel() for ratio in ratios.values()]),
                        strict=True))
    for name, ratio in ratios.items():
        divisors[name] = divisors[name].view_as(ratio.denominators).clamp(min=ratio.minimum)
        if config.normalise == "micro_batch":
            divisors[name] = divisors[name] * dist.world_size()
    sums = {name: ratio.numerators for name, ratio in ratios.items() if callable(ratio.numerators)}
    numerators = {name: ratio.numerators for name, ratio in ratios.items() if not callable(ratio.numerators)}
    weights = {name: config.weights[name] / divisors[name] for name in ratios}
    loss, totals = _SumRows.apply(outputs.logits, outputs, list(sums.values()),
                                  torch.stack([weights[name] for name in sums]))
    loss = sum(((weights[name] * numerator).sum() for name, numerator in numerators.items()), start=loss)
    numerators |= dict(zip(sums, totals, strict=True))
    shares = {name: numerators[name] / divisors[name] for name in ratios}
    return Shares(loss, {name: share.sum(1) if share.dim() > 1 else share for name, share in shares.items()})


class _SumRows(torch.autograd.Function):
    """(sum of weight * sum, the sums (K,) without gradient) over all rows.

    The gradient is computed with the sums, chunk by chunk, and is all that is kept: (R, V) in the logits' dtype.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, outputs: ModelOutputs, sums: Sequence[RowSum],
                weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        totals, gradient = torch.zeros_like(weights), torch.empty_like(logits)
        num_rows = max(1, _CHUNK // logits.shape[1])
        for start in range(0, len(logits), num_rows):
            rows = slice(start, start + num_rows)
            with torch.enable_grad():
                leaf = logits[rows].detach().float().requires_grad_()
                chunk = outputs.some(rows, leaf)
                parts = torch.stack([sum_rows(chunk) for sum_rows in sums])
                gradient[rows], = torch.autograd.grad(parts @ weights, leaf)
            totals += parts.detach()
        ctx.gradient = gradient
        ctx.mark_non_differentiable(totals)
        return totals @ weights, totals

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        gradient = ctx.gradient
        del ctx.gradient  # which is scaled in place: a second backward pass would be wrong
        return gradient.mul_(grad), None, None, None
