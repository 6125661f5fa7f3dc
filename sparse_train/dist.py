"""Ranks of a training job: their number and place, sums, exchange of objects. On one process all are the identity.

A rank is a process of the job. The device is that of DeepSpeed's accelerator; nothing here assumes a CPU. DeepSpeed is
imported where ranks start or a device is asked for: inference takes neither, and runs without it.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from sparse_train.errors import UserError

_num_sums = 0


def start(rank: int, world_size: int, local_rank: int, local_size: int, address: str, port: int,
          timeout: timedelta = timedelta(minutes=30)) -> None:
    """Join the process group at address:port, as one of the `local_size` ranks of this node.

    The timeout is passed explicitly because DeepSpeed's default changed between releases.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    from sparse_train.compat.deepspeed import disable_shared_memory_collectives

    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        local_rank %= accelerator.device_count()  # SLURM may show each task one GPU only
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(local_rank),
                      LOCAL_SIZE=str(local_size), MASTER_ADDR=address, MASTER_PORT=str(port))
    disable_shared_memory_collectives()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(local_rank)
    deepspeed.init_distributed(accelerator.communication_backend_name() if accelerator.device_name() != "cpu"
                               else "gloo", auto_mpi_discovery=False, timeout=timeout, verbose=False)


def stop() -> None:
    """Leave the process group."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def local_size() -> int:
    """Ranks on this node."""
    return int(os.environ["LOCAL_SIZE"]) if distributed.is_initialized() else 1


def node() -> tuple[int, int]:
    """(index of this node, number of nodes); ranks are counted node by node."""
    return rank() // local_size(), -(-world_size() // local_size())


def device() -> torch.device:
    """Of this rank."""
    from deepspeed.accelerator import get_accelerator

    return torch.device(get_accelerator().current_device_name())


def barrier() -> None:
    if world_size() > 1:
        distributed.barrier()


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sum in place over all ranks; returns `tensor`."""
    global _num_sums
    _num_sums += 1
    if world_size() > 1:
        distributed.all_reduce(tensor)
    return tensor


def broadcast(tensor: torch.Tensor, source: int) -> torch.Tensor:
    """Collective. Make `tensor` that of rank `source`, in place; returns it."""
    if world_size() > 1:
        distributed.broadcast(tensor, source)
    return tensor


def num_sums() -> int:
    """Number of sum_over_ranks that this rank has begun; training has at least one in every step."""
    return _num_sums


def any_rank(mine: bool) -> bool:
    """Collective. Whether `mine` is true on any rank."""
    return bool(sum_over_ranks(torch.tensor(float(mine), device=device())) > 0)


def gather_objects(mine: Any) -> list[Any]:
    """Collective. `mine` of every rank, in the order of ranks; for small plain data."""
    objects = [mine] * world_size()
    if world_size() > 1:
        distributed.all_gather_object(objects, mine)
    return objects


def from_rank_0(mine: Any) -> Any:
    """Collective. Rank 0's `mine` on every rank; plain data."""
    objects = [mine]
    if world_size() > 1:
        distributed.broadcast_object_list(objects, 0)
    return objects[0]


def agree(check: Callable[[], None]) -> None:
    """Collective. Run `check` on every rank; the UserError of the lowest rank that has one is raised on all."""
    try:
        check()
        problem = ""
    except UserError as error:
        problem = str(error)
    first_problem = next(filter(None, gather_objects(problem)), None)
    if first_problem:
        raise UserError(first_problem)


def share(items: list, num_sharing: int = 1) -> list:
    """This rank's contiguous part of `items`; parts differ in length by at most one and may be empty.

    `num_sharing` consecutive ranks get the same part.
    """
    part, num_parts = rank() // num_sharing, world_size() // num_sharing
    return items[len(items) * part // num_parts:len(items) * (part + 1) // num_parts]


def group_of_neighbours(size: int) -> Any:
    """Collective. This rank's process group, of `size` consecutive ranks. Raises UserError where `size` does not divide
    the number of ranks."""
    if world_size() % size:
        raise UserError(f"sequence_parallel={size} does not divide {world_size()} ranks; use a divisor")
    groups = [distributed.new_group(list(range(first, first + size))) for first in range(0, world_size(), size)]
    return groups[rank() // size]


def require_agreement(what: str, digests: dict[str, str]) -> None:
    """Collective. Raises RuntimeError on every rank where a digest differs; it names the entry and the ranks."""
    by_rank = gather_objects(digests)
    for name in {name: None for digests in by_rank for name in digests}:
        deviating = [number for number, other in enumerate(by_rank) if other.get(name) != by_rank[0].get(name)]
        if deviating:
            raise RuntimeError(f"{what} differ between ranks: {name} on ranks {deviating} is not what rank 0 has")
