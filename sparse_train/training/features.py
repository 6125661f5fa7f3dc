"""Block outputs as they are computed: the features of a loss, and where a number first stops being finite."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from sparse_train import dist
from sparse_train.models import block_output


class Tap:
    """Hooks on the outputs of `modules`. They visit nothing until visiting() is entered.

    Activation checkpointing runs the blocks again in the backward pass, when the tap is closed. To be made before
    DeepSpeed's engine, whose own hooks wrap the outputs.
    """

    def __init__(self, modules: Sequence[nn.Module]):
        self._visit: Callable[[int, torch.Tensor], Any] | None = None
        for index, module in enumerate(modules):
            module.register_forward_hook(functools.partial(self._hook, index))

    def _hook(self, index: int, module: nn.Module, inputs: Any, output: Any) -> None:
        if self._visit is not None:
            self._visit(index, block_output(output))

    @contextlib.contextmanager
    def visiting(self, visit: Callable[[int, torch.Tensor], Any]) -> Iterator[None]:
        """Inside, `visit(index, output (B, T, D))` is called for each module that runs."""
        self._visit = visit
        try:
            yield
        finally:
            self._visit = None


class FiniteCheck:
    """Sums of block outputs and of their gradients, left on the device: read only when a step has gone wrong."""

    def __init__(self, names: Sequence[str]):
        """`names` of the watched blocks."""
        self._names = names
        self._sums: list[tuple[str, torch.Tensor]] = []
        """(what, its sum), in the order of the computation."""

    def clear(self) -> None:
        """Forget the step before."""
        self._sums.clear()

    def watch(self, index: int, output: torch.Tensor) -> None:
        """A visitor of a Tap on the blocks."""
        self._record(f"the output of {self._names[index]}", output)
        if output.requires_grad:
            output.register_hook(functools.partial(self._record, f"the gradient of {self._names[index]}"))

    def _record(self, what: str, tensor: torch.Tensor) -> None:
        self._sums.append((what, tensor.detach().sum(dtype=torch.float32)))

    def first_bad(self) -> str:
        """Collective. The first block whose output, or gradient on the way back, is not finite, and its ranks."""
        bad = [(position, what) for position, (what, total) in enumerate(self._sums) if not torch.isfinite(total)]
        firsts = dist.gather_objects(bad[0] if bad else None)
        if not any(firsts):
            return "every block's output and gradient is finite, so it is the embedding, the head, the loss or a weight"
        first = min(filter(None, firsts))
        return f"first in {first[1]}, on ranks {[rank for rank, other in enumerate(firsts) if other == first]}"
