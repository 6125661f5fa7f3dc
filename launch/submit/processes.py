"""Start and stop processes of this machine, one per rank."""

import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from sparse_train.compat.submitit import local_process
from sparse_train.launch.run.cluster import ClusterConfig
from sparse_train.launch.worker.endings import STOP_PATIENCE_S

if TYPE_CHECKING:
    import submitit

log = logging.getLogger(__name__)


def start_processes(cluster: ClusterConfig, num_ranks: int, logs: Path, function: Callable[..., Any],
                    *arguments: Any) -> "submitit.Job":
    """Run `function(*arguments)` in `num_ranks` processes of this machine; their output is written to `logs`."""
    import submitit  # slow to import

    log.info("starting %d processes, whose output is in %s", num_ranks, logs)
    executor = submitit.LocalExecutor(logs.absolute())
    executor.update_parameters(tasks_per_node=num_ranks, gpus_per_node=cluster.visible_gpus(num_ranks),
                               timeout_min=7 * 24 * 60, stderr_to_stdout=True)
    # Ctrl-C and the end of a terminal signal the whole process group. The ranks ignore both, and get SIGTERM, which
    # lets them save.
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    # Without the safe path, a random.py in the current folder would be imported in place of Python's own.
    environment = {"PYTHONSAFEPATH": "1", **cluster.environment}
    earlier = {key: os.environ.get(key) for key in environment}
    os.environ.update(environment)
    try:
        return executor.submit(function, *arguments)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for key, value in earlier.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def stop_processes(job: "submitit.Job", patience_s: float = STOP_PATIENCE_S) -> None:
    """Let the ranks save. Kill those that still run after `patience_s`, or at a second Ctrl-C."""
    process = local_process(job)
    ranks = [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []
    process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + patience_s
    try:
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.2)
    finally:
        process.kill()
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
