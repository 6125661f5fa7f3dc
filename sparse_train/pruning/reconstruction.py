"""Block reconstruction: once a block's linears are pruned, Adam moves the values that are left until the block's output
is near that of the dense block on the same inputs. Bits, biases and norms stay as they are.

    minimise   sum |s - t|^2 / sum |t|^2     over real tokens; s, t: the outputs of the pruned and of the dense block

A step takes one calibration batch of each rank, so it sees more examples on more ranks. The learning rate falls
linearly to zero. Beside the block, memory holds its outputs on this rank's batches, and a gradient and two moments per
kept value.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import cast

import torch
from torch import nn

from sparse_train import dist
from sparse_train.config.pruning import ReconstructionConfig
from sparse_train.errors import UserError
from sparse_train.sparse import BitmaskTensor, SparseLinear
from sparse_train.sparse.swap import replace_module

log = logging.getLogger(__name__)


class Reconstruction:
    """Made while a block is dense; `fit` trains what pruning leaves of it."""

    @torch.no_grad()
    def __init__(self, name: str, run: Callable[[], Iterator[torch.Tensor]]):
        """`name`: the block's. `run` gives its outputs at the real tokens (N, D) of this rank's batches, one after the
        other, each computed when it is asked for."""
        self._name, self._run = name, run
        self._targets = [output.float() for output in run()]

    def fit(self, model: nn.Module, weights: Mapping[str, BitmaskTensor],
            config: ReconstructionConfig) -> dict[str, BitmaskTensor]:
        """`weights`, by module name, with new values, which the linears of `model` have then, too. Where training does
        not lower the block's error, they stay as they are. Collective."""
        linears = {name: cast(nn.Linear, model.get_submodule(name)) for name in weights}
        layers = {name: SparseLinear(weight, linears[name].bias) for name, weight in weights.items()}
        for name, layer in layers.items():
            replace_module(model, name, layer)
        try:
            before = self._error()
            self._train([layer.values for layer in layers.values()], config)
            after = self._error()
        finally:
            for name, linear in linears.items():
                replace_module(model, name, linear)
        if not before:  # as at sparsity 0
            return dict(weights)
        if not after < before:
            log.warning("%s: reconstruction would raise its error from %.4g to %.4g and is left out; lower "
                        "prune.reconstruction.learning_rate", self._name, before, after)
            return dict(weights)
        log.info("%s: reconstruction lowers its error from %.4g to %.4g", self._name, before, after)
        for name, layer in layers.items():
            linears[name].weight.data.copy_(layer.weight.to_dense())
        return {name: layer.weight for name, layer in layers.items()}

    @torch.enable_grad()
    def _train(self, values: list[nn.Parameter], config: ReconstructionConfig) -> None:
        adam, batches = torch.optim.Adam(values, config.learning_rate), self._batches()
        for step in range(config.steps):
            adam.param_groups[0]["lr"] = config.learning_rate * (1 - step / config.steps)
            gradients, energy = [torch.zeros_like(value) for value in values], values[0].new_zeros(())
            if self._targets:  # a rank may have no batch
                output, target = next(batches)
                gradients = list(torch.autograd.grad((output - target).square().sum(), values,
                                                     allow_unused=True, materialize_grads=True))
                energy += target.square().sum()
            dist.sum_over_ranks(energy)
            for value, gradient in zip(values, gradients, strict=True):
                value.grad = dist.sum_over_ranks(gradient).div_(energy)
            adam.step()

    def _batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Outputs and targets of one batch after the other, without end."""
        while self._targets:
            yield from zip(self._run(), self._targets, strict=True)

    @torch.no_grad()
    def _error(self) -> float:
        """Over all batches of all ranks. Raises UserError where they have no token."""
        sums = torch.zeros(2, dtype=torch.float64, device=dist.device())
        for output, target in zip(self._run(), self._targets, strict=True):
            sums += torch.stack([(output - target).square().sum(), target.square().sum()])
        error, energy = dist.sum_over_ranks(sums).tolist()
        if not energy:
            raise UserError(f"no calibration token reached {self._name}, whose output prune.reconstruction compares; "
                            "give more or shorter examples (prune.num_calibration, task.max_length)")
        return error / energy
