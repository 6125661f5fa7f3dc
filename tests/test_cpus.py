"""Threads follow the affinity and the control group's quota, found in files of both versions."""

import os

import pytest
import torch

from sparse_train import cpus


@pytest.mark.parametrize(("membership", "files", "expected"), [
    ("0::/", {"cpu.max": "max 100000"}, 16),
    ("0::/", {"cpu.max": "300000 100000"}, 3),
    ("0::/", {"cpu.max": "150000 100000"}, 1),
    ("0::/", {"cpu.max": "50000 100000"}, 1),
    ("0::/", {"cpu.max": "6400000 100000"}, 16),
    ("0::/job/step", {"cpu.max": "max 100000", "job/cpu.max": "400000 100000", "job/step/cpu.max": "800000 100000"}, 4),
    ("0::/of/the/host", {"cpu.max": "200000 100000"}, 2),
    ("0::/", {}, 16),
    ("0::/", {"cpu.max": "nonsense"}, 16),
    ("0::/../../outside", {"cpu.max": "200000 100000"}, 2),
    ("3:cpuset:/\n1:cpu,cpuacct:/job\n0::/", {"cpu/job/cpu.cfs_quota_us": "500000\n",
                                              "cpu/job/cpu.cfs_period_us": "100000\n"}, 5),
    ("1:cpu:/job", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 16),
    ("1:cpu:/host", {"cpu/cpu.cfs_quota_us": "250000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2),
])
def test_the_quota_of_the_control_group_counts(tmp_path, monkeypatch, membership, files, expected):
    (tmp_path / "membership").write_text(membership + "\n")
    for name, text in files.items():
        path = tmp_path / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(cpus, "_MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(cpus, "_MOUNT", tmp_path / "mount")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    assert cpus.available_cpus() == expected


@pytest.mark.parametrize(("environment", "processes", "expected"), [
    ({}, 1, 8), ({}, 3, 2), ({}, 20, 1), ({"SLURM_CPUS_PER_TASK": "4"}, 2, 4), ({"SLURM_CPUS_PER_TASK": "32"}, 2, 8),
    ({"SLURM_CPUS_PER_TASK": ""}, 2, 4), ({"OMP_NUM_THREADS": "5"}, 2, None),
])
def test_processes_of_a_node_share_its_cpus(monkeypatch, environment, processes, expected):
    chosen = []
    for name in ("SLURM_CPUS_PER_TASK", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cpus, "available_cpus", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    cpus.set_threads(processes)
    assert chosen == ([] if expected is None else [expected])
