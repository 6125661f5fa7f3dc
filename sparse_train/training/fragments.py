"""The training state that this rank owns, parameter by parameter, at any ZeRO stage.

A fragment is a range of a flattened parameter with its fp32 master values and Adam's two moments. Over all ranks the
fragments of a parameter cover it once. They are what a checkpoint holds, whatever the number of ranks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

from sparse_train import dist
from sparse_train.compat.deepspeed import (
    FlatRange,
    flat_masters,
    flat_range,
    gather_persistent_parameters,
    gradient_buffer,
    local_part,
    replicated_master,
)
from sparse_train.training.partition import shard_bounds

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (MASTER, *MOMENTS)

Read = Callable[[str, str, int, int], torch.Tensor]
"""(kind, parameter, start, stop) -> its entries, fp32."""


@dataclass(frozen=True)
class Fragment:
    name: str
    """The parameter's, as in the model."""
    start: int
    """First entry of the flattened parameter."""
    tensors: dict[str, torch.Tensor]
    """Kind -> (n,) fp32, of KINDS."""


def own_fragments(engine: Any) -> Iterator[Fragment]:
    """What this rank owns. After the first optimizer step: before it there are no moments."""
    for name, parameter in _trained_parameters(engine):
        if engine.zero_optimization_partition_weights():
            start, stop = shard_bounds(parameter.ds_numel, dist.rank(), dist.world_size())
            size = stop - start
            if size:
                yield Fragment(name, start, {
                    MASTER: safe_get_local_fp32_param(parameter)[:size],
                    **{kind: safe_get_local_optimizer_state(parameter, kind)[:size] for kind in MOMENTS}})
        elif engine.zero_optimization():
            place = flat_range(parameter)
            if place is not None:
                yield Fragment(name, place.parameter_start, {kind: _flat_view(engine, place, kind) for kind in KINDS})
        elif dist.rank() == 0:
            master = replicated_master(engine, parameter)
            yield Fragment(name, 0, {kind: _state(engine, master, kind).flatten() for kind in KINDS})


def state_bytes(engine: Any) -> int:
    """Bytes that this rank holds between steps: parameters, bits, buffers, masters, moments and gradients."""
    masters = flat_masters(engine)
    tensors = [*map(local_part, engine.module.parameters()), *engine.module.buffers(), *masters]
    for master in masters:
        tensors += [value for value in engine.basic_optimizer.state[master].values() if torch.is_tensor(value)]
    if engine.zero_optimization_partition_weights():
        tensors.append(gradient_buffer(engine))
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


@torch.no_grad()
def restore(engine: Any, read: Read, num_steps: int) -> None:
    """Set master values, moments and the model's own parameters to what `read` gives; `num_steps` is Adam's count."""
    _create_moments(engine, num_steps)
    for name, parameter in _trained_parameters(engine):
        if engine.zero_optimization_partition_weights():
            _restore_partition(name, parameter, read)
            continue
        parameter.copy_(read(MASTER, name, 0, parameter.numel()).view_as(parameter))
        if engine.zero_optimization():
            place = flat_range(parameter)
            if place is not None:
                start = place.parameter_start
                for kind in KINDS:
                    _flat_view(engine, place, kind).copy_(read(kind, name, start, start + place.numel))
        else:
            master = replicated_master(engine, parameter)
            for kind in KINDS:
                whole = _state(engine, master, kind)
                whole.copy_(read(kind, name, 0, whole.numel()).view_as(whole))
    if engine.zero_optimization_partition_weights():
        gather_persistent_parameters(engine)


def _restore_partition(name: str, parameter: Any, read: Read) -> None:
    start, stop = shard_bounds(parameter.ds_numel, dist.rank(), dist.world_size())
    for kind in KINDS:
        padded = torch.zeros(parameter.ds_tensor.numel())
        padded[:stop - start] = read(kind, name, start, stop)
        if kind == MASTER:
            safe_set_local_fp32_param(parameter, padded)
            parameter.ds_tensor.copy_(padded)
        else:
            safe_set_local_optimizer_state(parameter, padded, kind)


def _create_moments(engine: Any, num_steps: int) -> None:
    """The state that AdamW would make in its first step, at step `num_steps`."""
    for master in flat_masters(engine):
        engine.basic_optimizer.state[master] = {
            "step": torch.tensor(float(num_steps), device=master.device),
            **{kind: torch.zeros_like(master) for kind in MOMENTS}}


def _flat_view(engine: Any, place: FlatRange, kind: str) -> torch.Tensor:
    return _state(engine, flat_masters(engine)[place.group], kind).narrow(0, place.flat_start, place.numel)


def _state(engine: Any, master: torch.Tensor, kind: str) -> torch.Tensor:
    """Of KINDS, for a master of the optimizer."""
    return master.detach() if kind == MASTER else engine.basic_optimizer.state[master][kind]


def _trained_parameters(engine: Any) -> list[tuple[str, Any]]:
    return [(name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad]
