"""Memory and device load of the nodes, for the lines of metrics."""

import resource

import psutil
import torch

from sparse_train import dist

RESOURCES = ("memory_gb", "gpu_memory_gb", "gpu_percent")
"""Resident memory, reserved device memory (both in 1e9 bytes), mean load of the devices in percent."""


def usage_by_node(device: torch.device) -> torch.Tensor:
    """(nodes, RESOURCES) float64: this rank's part of what its node uses. The sum over the ranks is what all use."""
    node, num_nodes = dist.node()
    usage = torch.zeros(num_nodes, len(RESOURCES), dtype=torch.double, device=device)
    usage[node] = torch.tensor(_usage(device))
    return usage


def _usage(device: torch.device) -> list[float]:
    memory_gb = psutil.Process().memory_info().rss / 1e9
    if device.type != "cuda":
        return [memory_gb, 0.0, 0.0]
    try:
        load = torch.cuda.utilization(device) / dist.local_size()
    except Exception:  # the driver's library is missing or refuses; that must not end a training
        load = 0.0
    return [memory_gb, torch.cuda.memory_reserved(device) / 1e9, load]


def peak_memory(device: torch.device) -> int:
    """Bytes of memory that this process has had at most, of the device where that has its own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
