"""The weighted terms of a loss, as shares of one sum over all ranks.

    total = task_weight * CE + logit_weight * KL(teacher || student) * T^2 + feature_weight * SquareHead + ...

Each term is a ratio whose numerator and denominator are summed over all ranks of the global micro-step, so that it does
not depend on how examples, or the tokens of one example, fall on ranks. A rank's share is its own numerator over the
global denominator; the shares add up to the loss, and so do their gradients. Denominators carry no gradient and are
reduced once per micro-step. `normalise: micro_batch` forms the ratios per rank and means them, as the paper's codes do
(arXiv 2310.06927).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sparse_train import dist
from sparse_train.config import LossConfig
from sparse_train.registry import LOSS_TERMS
from sparse_train.training.terms import LossTerm, ModelOutputs


@dataclass(frozen=True)
class Shares:
    """This rank's part of the terms of one micro-step; sums over ranks are the terms."""

    loss: torch.Tensor
    """Scalar with gradient: the weighted sum of the terms below."""
    terms: dict[str, torch.Tensor]
    """By the terms' names, unweighted: scalars, or (L,) for a term of L parts."""

    def detached(self) -> "Shares":
        return Shares(self.loss.detach(), {name: term.detach() for name, term in self.terms.items()})


def new_terms(config: LossConfig) -> dict[str, LossTerm]:
    """The terms of one micro-step by name, in the order of `config.weights`."""
    return {name: LOSS_TERMS.load(name)(config) for name in config.weights}


def weighted_loss(config: LossConfig, terms: Mapping[str, LossTerm], outputs: ModelOutputs) -> Shares:
    """This rank's share of the loss. Collective: every rank must call it with the same terms."""
    ratios = {name: term.ratio(outputs) for name, term in terms.items()}
    denominators = torch.cat([ratio.denominators.reshape(-1).to(outputs.predictions.dtype)
                              for ratio in ratios.values()])
    if config.normalise == "global":
        denominators = dist.sum_over_ranks(denominators)
    shares: dict[str, torch.Tensor] = {}
    for (name, ratio), denominator in zip(
            ratios.items(), denominators.split([ratio.denominators.numel() for ratio in ratios.values()]), strict=True):
        shares[name] = ratio.numerators / denominator.view_as(ratio.numerators).clamp(min=ratio.minimum)
        if config.normalise == "micro_batch":
            shares[name] = shares[name] / dist.world_size()
    loss = sum((config.weights[name] * share.sum() for name, share in shares.items()), start=outputs.zero)
    return Shares(loss, shares)
