"""Block outputs as they pass: SquareHead's features, and where a number first stops being finite."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from sparse_train import dist
from sparse_train.models import block_output


class Tap:
    """Calls `visit(index, output (B, T, D))` for each of `modules` in a forward pass run inside `with tap:`.

    Outside of it the hooks do nothing: activation checkpointing runs the blocks again in the backward pass. To be made
    before DeepSpeed's engine, whose own hooks wrap the outputs.
    """

    def __init__(self, modules: Sequence[nn.Module], visit: Callable[[int, torch.Tensor], None]):
        self._open = False
        for index, module in enumerate(modules):
            module.register_forward_hook(self._hook(index, visit))

    def _hook(self, index, visit):
        def hook(module, inputs, output):
            if self._open:
                visit(index, block_output(output))
        return hook

    def __enter__(self) -> "Tap":
        self._open = True
        return self

    def __exit__(self, *exception):
        self._open = False


class FiniteCheck:
    """Sums of block outputs and of their gradients, left on the device: read only when a step has gone wrong."""

    def __init__(self, names: Sequence[str]):
        """`names` of the watched blocks."""
        self._names = names
        self._marks: list[tuple[str, int, torch.Tensor]] = []

    def clear(self) -> None:
        self._marks.clear()

    def watch(self, index: int, output: torch.Tensor) -> None:
        self._mark("output", index, output)
        if output.requires_grad:
            output.register_hook(lambda grad: self._mark("gradient", index, grad))

    def _mark(self, what, index, tensor):
        self._marks.append((what, index, tensor.detach().sum(dtype=torch.float32)))

    def first_bad(self) -> str:
        """Collective. The first block whose output, or gradient on the way back, is not finite, and its ranks."""
        bad = [(place, f"the {what} of {self._names[index]}") for place, (what, index, total) in enumerate(self._marks)
               if not torch.isfinite(total)]
        everyone = dist.gather_objects(bad[0] if bad else None)
        found = [(*mark, rank) for rank, mark in enumerate(everyone) if mark]
        if not found:
            return "every block's output and gradient is finite, so it is the embedding, the head, the loss or a weight"
        place, what, _ = min(found)
        return f"first in {what}, on ranks {[rank for p, w, rank in found if (p, w) == (place, what)]}"
