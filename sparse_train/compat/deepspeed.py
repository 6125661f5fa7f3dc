"""What this package needs of DeepSpeed and DeepSpeed does not offer in public. Tested with DeepSpeed 0.19.8.

Under ZeRO-3 a parameter is partitioned: flattened and cut in equal parts, one per rank; the tensor itself is empty
between uses. Under stages 1 and 2 the parameters are whole. Their fp32 masters are laid end to end, per group of the
optimizer, and that is cut in as many parts as there are ranks.
"""

from dataclasses import dataclass
from typing import Any

import torch


def disable_shared_memory_collectives() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives at the first start on a CPU.

    That takes 20 s, fails below a folder with a space in its name, and serves inference only: training reduces through
    the process group.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def convert_to_partitioned(init: Any, parameter: torch.nn.Parameter) -> None:
    """Give `parameter` the attributes and methods of ZeRO-3, as a deepspeed.zero.Init does for the modules made in it.

    It stays whole until `partition`. There is no public way for a module that exists already.
    """
    init._convert_to_deepspeed_param(parameter)


def partition(parameter: Any) -> None:
    """Of a parameter under ZeRO-3, keep this rank's part and free the rest."""
    parameter.partition()


def is_partitioned(parameter: torch.Tensor) -> bool:
    return hasattr(parameter, "ds_id")


def full_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape of the parameter, partitioned or not."""
    return getattr(parameter, "ds_shape", parameter.shape)


def local_part(parameter: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a parameter: its part, padded to the length of all parts, or the whole."""
    return getattr(parameter, "ds_tensor", parameter)


def release(module: torch.nn.Module) -> None:
    """Free what this rank holds of a module under ZeRO-3 that is not used any more. DeepSpeed's stack of running
    modules keeps the module of every engine for ever."""
    for parameter in module.parameters():
        for tensor in (parameter, local_part(parameter)):
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)


@dataclass(frozen=True)
class FlatRange:
    """Where a rank's range of a parameter lies in the rank's flat masters, under stages 1 and 2."""

    parameter_start: int
    """First entry of the flattened parameter."""
    group: int
    """Of the optimizer."""
    flat_start: int
    numel: int


def flat_range(parameter: torch.Tensor) -> FlatRange | None:
    """This rank's range of `parameter`, None where it has none. The public safe_get functions gather whole tensors."""
    mapping: Any = getattr(parameter, "_hp_mapping")  # noqa: B009 - unknown to the type of tensors
    if mapping is None:
        return None
    flat = mapping.hp_fragment_address
    return FlatRange(mapping.lp_fragment_address.start, mapping.param_group_index, flat.start, flat.numel)


def flat_masters(engine: Any) -> list[torch.Tensor]:
    """The fp32 masters that the optimizer updates on this rank: a flat one per group under stages 1 and 2, per
    sub-group under stage 3 (whose optimizer steps on one at a time), one per parameter without ZeRO."""
    if engine.zero_optimization_partition_weights():
        return engine.optimizer.fp32_partitioned_groups_flat
    return [master for group in engine.basic_optimizer.param_groups for master in group["params"]]


def replicated_master(engine: Any, parameter: torch.Tensor) -> torch.Tensor:
    """The fp32 master of a parameter without ZeRO: the parameter itself in fp32, the optimizer's copy in bf16."""
    for parameters, masters in zip(getattr(engine.optimizer, "fp16_groups", []),
                                   getattr(engine.optimizer, "fp32_groups", []), strict=True):
        for candidate, master in zip(parameters, masters, strict=True):
            if candidate is parameter:
                return master
    return parameter


def gradient_buffer(engine: Any) -> torch.Tensor:
    """Where ZeRO-3 keeps this rank's gradients between micro-steps."""
    return engine.optimizer.grad_partitions_flat_buffer


def gather_persistent_parameters(engine: Any) -> None:
    """Fill the small parameters, which ZeRO-3 keeps whole on every rank, from their partitions. Collective."""
    parameters = engine.optimizer.persistent_parameters
    if parameters:
        parameters[0].partition(parameters)
        parameters[0].all_gather(parameters)
