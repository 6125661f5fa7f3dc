"""The training state that this rank owns, parameter by parameter, at any ZeRO stage.

A fragment is a range of a flattened parameter with its fp32 master values and Adam's two moments. Over all ranks the
fragments of a parameter cover it once. They are what a checkpoint holds, whatever the number of ranks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

from sparse_train import dist
from sparse_train.training.partition import part

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


def own_fragments(engine) -> Iterator[Fragment]:
    """What this rank owns. After the first optimizer step: before it there are no moments."""
    for name, parameter in _trained(engine):
        if engine.zero_optimization_partition_weights():
            start, stop = part(parameter.ds_numel, dist.rank(), dist.world_size())
            size = stop - start
            if size:
                yield Fragment(name, start, {
                    MASTER: safe_get_local_fp32_param(parameter)[:size],
                    **{kind: safe_get_local_optimizer_state(parameter, kind)[:size] for kind in MOMENTS}})
        elif engine.zero_optimization():
            if parameter._hp_mapping is not None:
                start = parameter._hp_mapping.lp_fragment_address.start
                yield Fragment(name, start, {kind: _flat_view(engine, parameter, kind) for kind in KINDS})
        elif dist.rank() == 0:
            master = _master_of(engine, parameter)
            state = engine.basic_optimizer.state[master]
            yield Fragment(name, 0, {MASTER: master.detach().flatten(),
                                     **{kind: state[kind].flatten() for kind in MOMENTS}})


def state_bytes(engine) -> int:
    """Bytes that this rank holds between steps: parameters, bits, buffers, masters, moments and gradients."""
    held = [getattr(parameter, "ds_tensor", parameter) for parameter in engine.module.parameters()]
    held += engine.module.buffers()
    masters = _flat_masters(engine)
    held += masters
    held += [value for master in masters for value in engine.basic_optimizer.state[master].values()
             if torch.is_tensor(value)]
    if engine.zero_optimization_partition_weights():
        held.append(engine.optimizer.grad_partitions_flat_buffer)
    held = {tensor.data_ptr(): tensor.nbytes for tensor in held}
    return sum(held.values())


@torch.no_grad()
def restore(engine, read: Read, num_steps: int) -> None:
    """Set master values, moments and the model's own parameters to what `read` gives; `num_steps` is Adam's count."""
    _create_moments(engine, num_steps)
    for name, parameter in _trained(engine):
        if engine.zero_optimization_partition_weights():
            _restore_partition(name, parameter, read)
            continue
        parameter.copy_(read(MASTER, name, 0, parameter.numel()).view_as(parameter))
        if engine.zero_optimization():
            if parameter._hp_mapping is not None:
                start = parameter._hp_mapping.lp_fragment_address.start
                for kind in KINDS:
                    view = _flat_view(engine, parameter, kind)
                    view.copy_(read(kind, name, start, start + view.numel()))
        else:
            master = _master_of(engine, parameter)
            for kind in KINDS:
                whole = master if kind == MASTER else engine.basic_optimizer.state[master][kind]
                whole.copy_(read(kind, name, 0, whole.numel()).view_as(whole))
    if engine.zero_optimization_partition_weights():
        # Small parameters are kept whole; they are gathered anew from the partitions just set.
        kept_whole = engine.optimizer.persistent_parameters
        if kept_whole:
            kept_whole[0].partition(kept_whole)
            kept_whole[0].all_gather(kept_whole)


def _restore_partition(name: str, parameter: torch.Tensor, read: Read) -> None:
    start, stop = part(parameter.ds_numel, dist.rank(), dist.world_size())
    for kind in KINDS:
        padded = torch.zeros(parameter.ds_tensor.numel())
        padded[:stop - start] = read(kind, name, start, stop)
        if kind == MASTER:
            safe_set_local_fp32_param(parameter, padded)
            parameter.ds_tensor.copy_(padded)
        else:
            safe_set_local_optimizer_state(parameter, padded, kind)


def _create_moments(engine, num_steps: int) -> None:
    """The state that AdamW would make in its first step, at step `num_steps`."""
    state = engine.basic_optimizer.state
    for master in _flat_masters(engine):
        state[master] = {"step": torch.tensor(float(num_steps), device=master.device),
                         **{kind: torch.zeros_like(master) for kind in MOMENTS}}


def _flat_view(engine, parameter: torch.Tensor, kind: str) -> torch.Tensor:
    """Stages 1 and 2 lay parameters end to end and cut that in as many parts as there are ranks: ours of this one."""
    mapping = parameter._hp_mapping
    flat = engine.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
    whole = flat.detach() if kind == MASTER else engine.basic_optimizer.state[flat][kind]
    return whole.narrow(0, mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel)


def _flat_masters(engine) -> list[torch.Tensor]:
    if engine.zero_optimization_partition_weights():
        return engine.optimizer.fp32_partitioned_groups_flat
    return [master for group in engine.basic_optimizer.param_groups for master in group["params"]]


def _trained(engine) -> list[tuple[str, torch.Tensor]]:
    return [(name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad]


def _master_of(engine, parameter: torch.Tensor) -> torch.Tensor:
    """Without ZeRO: the parameter itself in fp32, the optimizer's copy of it in bf16."""
    for low, high in zip(getattr(engine.optimizer, "fp16_groups", []), getattr(engine.optimizer, "fp32_groups", []),
                         strict=True):
        for candidate, master in zip(low, high, strict=True):
            if candidate is parameter:
                return master
    return parameter
