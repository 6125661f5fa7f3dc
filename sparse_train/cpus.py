"""The CPUs that this process may use: name, number (affinity, the control group's quota), and threads on them."""

import os
import platform
import re
from collections.abc import Iterator
from pathlib import Path

import torch

_MEMBERSHIP, _MOUNT, _CPUINFO = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"), Path("/proc/cpuinfo")


def cpu_name() -> str:
    found = re.search(r"^model name\s*: *(.+)$", _read(_CPUINFO), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def available_cpus() -> int:
    """At least 1. A quota of one and a half CPUs is one: the parts of a product wait for the slowest."""
    return max(1, int(min([len(os.sched_getaffinity(0)), *_quotas()])))


def set_threads(num_processes: int = 1) -> None:
    """Let torch and our kernels use this process's share of the CPUs, or what OMP_NUM_THREADS says.

    `num_processes`: how many on this node share the CPUs that are visible to them.
    """
    if os.environ.get("OMP_NUM_THREADS"):
        return
    given, bound = available_cpus(), os.environ.get("SLURM_CPUS_PER_TASK", "")
    # Where SLURM binds each rank to CPUs of its own, there is nothing to divide.
    own = min(given, int(bound)) if bound.isdecimal() and int(bound) else given // num_processes
    torch.set_num_threads(max(1, own))


def _quotas() -> Iterator[float]:
    """CPUs' worth of time that each group on the way up from ours allows, where it sets a limit."""
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
                found = [_read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
            else:
                found = _read(folder / "cpu.max").split()
            if len(found) == 2 and all(number.strip().isdecimal() for number in found) and int(found[1]):
                yield int(found[0]) / int(found[1])  # "max" and -1 are no limit


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
