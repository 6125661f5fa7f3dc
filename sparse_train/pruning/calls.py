"""What a model calls its blocks with, recorded in forward passes of the model itself.

A block is called as the model called it; nothing of a model's inside is repeated here.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sparse_train.errors import UserError
from sparse_train.models.filled import replaced_forwards
from sparse_train.tasks import Batch


@dataclass(frozen=True)
class Call:
    """A block's arguments; its hidden states are the first one, by position or by name."""

    args: tuple
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> torch.Tensor:
        return self.args[0] if self.args else self.kwargs["hidden_states"]

    def with_hidden(self, states: torch.Tensor | None) -> "Call":
        if self.args:
            return Call((states, *self.args[1:]), self.kwargs)
        return Call((), {**self.kwargs, "hidden_states": states})

    def others(self) -> list[torch.Tensor]:
        """Tensors among the arguments other than the hidden states: masks, positions, the encoder's states."""
        return [value for value in (*self.args[1:], *(v for k, v in self.kwargs.items() if k != "hidden_states"))
                if isinstance(value, torch.Tensor)]


def record_calls(model: PreTrainedModel, blocks: list[nn.Module], batches: list[Batch],
                 for_gradients: bool = False) -> list[list[Call]]:
    """What each block is called with, by batch; of the hidden states only the first block's are kept.

    What blocks get besides hidden states seldom depends on what the blocks before them compute. Where the first batch
    shows that it does not, the blocks of the others do nothing; where it shows that it does, a UserError is raised
    `for_gradients`, which reach earlier blocks by hidden states alone.
    """
    records: list[list[Call]] = []
    skips = False
    for batch in batches:
        record, returns_states = _record(model, blocks, batch, skips)
        if not records and returns_states:
            skipped, _ = _record(model, blocks, batch, skips=True)
            skips = all(_same_others(call, other) for call, other in zip(record, skipped, strict=True))
            if for_gradients and not skips:
                raise UserError("pruning by gradients (prune.method=obert) needs blocks that get hidden states alone "
                                f"from those before them, and in this {model.config.model_type} model some get more; "
                                "choose another method")
        records.append(record)
    return records


class _AllRecorded(Exception):
    """Ends a forward pass when the last block is called."""


def _record(model: PreTrainedModel, blocks: list[nn.Module], batch: Batch, skips: bool) -> tuple[list[Call], bool]:
    """(each block's call, whether all blocks but the last return hidden states alone). `skips`: they return those that
    they get."""
    calls: list[Call] = []
    is_tensor: list[bool] = []

    def record(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        call = Call(args, kwargs)
        calls.append(call.with_hidden(None) if calls else call)
        if module is blocks[-1]:
            raise _AllRecorded

    def skip(*args: Any, **kwargs: Any) -> torch.Tensor:
        return Call(args, kwargs).hidden

    handles = [block.register_forward_hook(
        lambda module, args, output: is_tensor.append(isinstance(output, torch.Tensor))) for block in blocks]
    try:
        with pre_hooks(blocks, record), replaced_forwards(dict.fromkeys(blocks if skips else [], skip)):
            model(**batch.inputs(), use_cache=False)
    except _AllRecorded:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return calls, all(is_tensor)


def _same_others(call: Call, other: Call) -> bool:
    """Whether two calls agree in all but the hidden states."""
    mine, others = call.others(), other.others()
    return len(mine) == len(others) and all(map(torch.equal, mine, others))


@contextmanager
def pre_hooks(modules: Iterable[nn.Module],
              hook: Callable[[nn.Module, tuple, dict[str, Any]], None]) -> Iterator[None]:
    """`hook` is called before each of `modules` runs."""
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
