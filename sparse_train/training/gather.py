"""Whole tensors of a partitioned model."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import deepspeed
import torch

from sparse_train.compat.deepspeed import is_partitioned
from sparse_train.models import own_tensors


def gathered(tensor: torch.Tensor) -> AbstractContextManager[None]:
    """A context in which a tensor is whole, for reading. Collective where it is partitioned."""
    return deepspeed.zero.GatheredParameters([tensor], enabled=is_partitioned(tensor))


def gathered_tensors(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of the engine's model, whole on the CPU, gathered one by one. Every rank must iterate."""
    for name, tensor in own_tensors(engine.module).items():
        with gathered(tensor):
            yield name, tensor.detach().cpu().clone()
