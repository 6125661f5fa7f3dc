"""Ranks of the tests are CPU processes, also where there is a GPU; the tests marked gpu ask for it. Without one, Triton
interprets its kernels, which it must know before anything imports it."""

import os

import torch

os.environ["DS_ACCELERATOR"] = "cpu"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_terminal_summary(terminalreporter):
    """Which machine a green run was on: what needs AVX-512 is skipped without it."""
    from sparse_train import cpus, kernels

    terminalreporter.write_line(
        f"machine: {cpus.cpu_name()}, {cpus.available_cpus()} CPUs, {kernels.backend()} kernels")
