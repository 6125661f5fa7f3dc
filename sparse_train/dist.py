"""Ranks: who am I, how many are we, sums over all, and agreement. Everything is the identity on one process.

A rank is a process of the training job. The device is what DeepSpeed's accelerator says; nothing here assumes a CPU.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import distributed

from sparse_train.compat.deepspeed import disable_shared_memory_collectives
from sparse_train.errors import UserError

_num_sums = 0


def start(rank: int, world_size: int, local_rank: int, local_size: int, address: str, port: int,
          timeout: timedelta = timedelta(minutes=30)) -> None:
    """Join the process group at address:port, as one of the `local_size` ranks of this node.

    The timeout is passed explicitly because DeepSpeed's default changed between releases.
    """
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        local_rank %= accelerator.device_count()  # a job step may show each task no GPU but its own
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(local_rank),
                      LOCAL_SIZE=str(local_size), MASTER_ADDR=address, MASTER_PORT=str(port))
    disable_shared_memory_collectives()
    if accelerator.device_name() != "cpu":
        accelerator.set_device(local_rank)
    deepspeed.init_distributed(accelerator.communication_backend_name() if accelerator.device_name() != "cpu"
                               else "gloo", auto_mpi_discovery=False, timeout=timeout, verbose=False)


def stop() -> None:
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


def num_sums() -> int:
    """How many sum_over_ranks this rank has begun; a training has one at least in every step."""
    return _num_sums


def any_rank(mine: bool) -> bool:
    """Whether it holds on any rank."""
    return bool(sum_over_ranks(torch.tensor(float(mine), device=device())) > 0)


def gather_objects(mine: Any) -> list[Any]:
    """`mine` of every rank, in the order of ranks; for small plain data."""
    everyone = [mine] * world_size()
    if world_size() > 1:
        distributed.all_gather_object(everyone, mine)
    return everyone


def agree(check: Callable[[], None]) -> None:
    """Run `check` on every rank. Collective: a UserError of any of them is raised on all, that of the lowest rank."""
    try:
        check()
        problem = ""
    except UserError as error:
        problem = str(error)
    if found := next(filter(None, gather_objects(problem)), None):
        raise UserError(found)


def share(items: list, num_sharing: int = 1) -> list:
    """This rank's contiguous part of `items`; parts differ in length by at most one and may be empty.

    `num_sharing` consecutive ranks get the same part.
    """
    part, num_parts = rank() // num_sharing, world_size() // num_sharing
    return items[len(items) * part // num_parts:len(items) * (part + 1) // num_parts]


def group_of_neighbours(size: int):
    """This rank's process group, of `size` consecutive ranks. Raises UserError where they do not divide all ranks."""
    if world_size() % size:
        raise UserError(f"sequence_parallel={size} does not divide {world_size()} ranks; use a divisor")
    groups = [distributed.new_group(list(range(first, first + size))) for first in range(0, world_size(), size)]
    return groups[rank() // size]


def require_agreement(what: str, digests: dict[str, str]) -> None:
    """Stop every rank when a digest differs between ranks; the message names the entries and the ranks."""
    everyone = gather_objects(digests)
    for name in {name: None for digests in everyone for name in digests}:
        odd = [r for r, theirs in enumerate(everyone) if theirs.get(name) != everyone[0].get(name)]
        if odd:
            raise RuntimeError(f"{what} differ between ranks: {name} on ranks {odd} is not what rank 0 has")
