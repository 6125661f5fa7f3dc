"""The CPUs that this process may use: name, number (affinity, the control group's quota), and threads on them."""

import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

import torch

_MEMBERSHIP, _MOUNT, _CPUINFO = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"), Path("/proc/cpuinfo")


def cpu_name() -> str:
    """The model's name, such as AMD EPYC 7B13; the architecture where the system does not know it."""
    match = re.search(r"^model name\s*: *(.+)$", _read(_CPUINFO), re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()


def available_cpus() -> int:
    """How many CPUs this process may use, at least 1. A quota of one and a half counts as one: threads that share the
    work of a matrix product wait for the slowest."""
    return max(1, int(min([len(os.sched_getaffinity(0)), *_quotas()])))


def set_threads(num_processes: int = 1) -> None:
    """Let torch and our kernels use this process's share of the CPUs, or what OMP_NUM_THREADS says.

    `num_processes`: how many on this node share the CPUs that are visible to them.
    """
    if os.environ.get("OMP_NUM_THREADS"):
        return
    num_visible, per_task = available_cpus(), os.environ.get("SLURM_CPUS_PER_TASK", "")
    # Where SLURM binds each rank to its CPUs, there is nothing to divide.
    is_bound = per_task.isdecimal() and int(per_task) > 0
    num_threads = min(num_visible, int(per_task)) if is_bound else num_visible // num_processes
    torch.set_num_threads(max(1, num_threads))


def _quotas() -> Iterator[float]:
    """The limit in CPUs that each control group above this process sets, for those that set one."""
    for line in _read(_MEMBERSHIP).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = _MOUNT / "cpu" if controllers else _MOUNT
        group = mount / path.lstrip("/")
        for folder in [group, *group.parents]:
            if not folder.is_relative_to(mount):
                break
            if controllers:
                numbers = [_read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
            else:
                numbers = _read(folder / "cpu.max").split()
            if len(numbers) == 2 and all(number.strip().isdecimal() for number in numbers) and int(numbers[1]):
                yield int(numbers[0]) / int(numbers[1])  # "max" and -1 mean that there is no limit


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
