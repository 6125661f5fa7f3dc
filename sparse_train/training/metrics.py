"""Lines of metrics: means over the steps since the last line, summed over the ranks in one reduction."""

import time
from typing import Any

import torch

from sparse_train import dist
from sparse_train.registry import LOSS_TERMS
from sparse_train.resources import RESOURCES, usage_by_node
from sparse_train.training.step import StepResult

_NUM_TOKENS = "num_tokens"


class Meter:
    """add() after each step, report() when a line is due."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._num_micro_steps = 0
        self._start = time.perf_counter()

    def add(self, result: StepResult) -> None:
        """Does not wait for the device."""
        for micro_step in result.micro_steps:
            shares = micro_step.shares
            for name, value in {"loss": shares.loss, **shares.terms, _NUM_TOKENS: micro_step.num_tokens}.items():
                self._sums[name] = self._sums.get(name, 0) + value.reshape(-1)
        self._num_micro_steps += len(result.micro_steps)
        self._rates = {"learning_rate": result.learning_rate, "gradient_norm": result.gradient_norm}

    def report(self) -> dict[str, Any]:
        """Collective, after one add() at least: the loss and its terms as means per micro-step, the last step's rate
        and gradient norm, tokens/s, what each node uses."""
        sums = [value.double() for value in self._sums.values()]
        usage = usage_by_node(sums[0].device)
        total = dist.sum_over_ranks(torch.cat([usage.flatten(), *sums]))
        node_usage, *values = total.split([usage.numel(), *map(len, sums)])
        totals = {name: value.tolist() for name, value in zip(self._sums, values, strict=True)}
        (num_tokens,) = totals.pop(_NUM_TOKENS)
        line: dict[str, Any] = {}
        for name, parts in totals.items():
            means = [part / self._num_micro_steps for part in parts]
            line[name] = sum(means)
            key = LOSS_TERMS.entries[name].parts_key if name in LOSS_TERMS.entries else None
            if key is not None:
                line[key] = {str(index): mean for index, mean in enumerate(means)}
        line |= {**self._rates, "tokens_per_second": num_tokens / (time.perf_counter() - self._start),
                 "nodes": {str(node): dict(zip(RESOURCES, row, strict=True))
                           for node, row in enumerate(node_usage.view_as(usage).tolist())}}
        self._reset()
        return line
