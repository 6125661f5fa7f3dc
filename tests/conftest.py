"""Ranks of the tests are CPU processes, also where there is a GPU; the tests marked gpu ask for it."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"


def pytest_terminal_summary(terminalreporter):
    """Which machine a green run was on: what needs AVX-512 is skipped without it."""
    from sparse_train import cpus, kernels

    terminalreporter.write_line(
        f"machine: {cpus.cpu_name()}, {cpus.available_cpus()} CPUs, {kernels.backend()} kernels")
