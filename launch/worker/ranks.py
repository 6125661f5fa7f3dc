"""Join the ranks of a stage, and end this process when another rank falls silent."""

import contextlib
import logging
import os
import threading
from datetime import timedelta
from pathlib import Path

from sparse_train import dist
from sparse_train.cpus import set_threads
from sparse_train.heartbeat import Heartbeat
from sparse_train.launch.run.cluster import ClusterConfig
from sparse_train.launch.worker.endings import EXIT_CODES, Ending, write_ending
from sparse_train.launch.worker.process_info import ProcessInfo

log = logging.getLogger(__name__)
_GIVE_UP_S = 10
_APART = timedelta(days=1)
"""In a pruning or an evaluation a rank may be at one linear or batch for hours while the others wait for it. The
heartbeat sees whether it works or hangs."""


def join_ranks(process: ProcessInfo, cluster: ClusterConfig, port: int, logs: Path | None = None,
               works_apart: bool = False) -> Heartbeat:
    """Make this process the rank that it was started as, and watch the others. Collective.

    `port`: of the rendezvous on the first node; `logs`: where an ending is written when another rank falls silent;
    `works_apart`: the ranks meet after work that may take one of them much longer than another.
    """
    set_threads(process.ranks_on_node)
    # Twice silence_s: a collective that times out cannot say whose fault it is, so the heartbeat should come first.
    limit = timedelta(seconds=2 * cluster.silence_s)

    def give_up(silence: str) -> None:
        # Storage may be unreachable too, so exit even where writing the ending blocks.
        timer = threading.Timer(_GIVE_UP_S, os._exit, (EXIT_CODES["lost"],))
        timer.daemon = True
        timer.start()
        log.error("giving up: %s", silence)
        if logs is not None:
            with contextlib.suppress(OSError):
                write_ending(logs, process.attempt, Ending("lost", silence, process.rank))
        os._exit(EXIT_CODES["lost"])

    # Until there are heartbeats, a rank that never comes ends the others as soon in either case.
    joining = threading.Timer(limit.total_seconds(), give_up,
                              (f"the ranks have not met in {limit.total_seconds():g} s",))
    joining.daemon = True
    joining.start()
    try:
        dist.start(process.rank, process.num_ranks, process.local_rank, process.ranks_on_node, process.nodes[0], port,
                   _APART if works_apart else limit)
        return Heartbeat(process.host, process.nodes[0], cluster.silence_s, give_up,
                         watches_hangs=works_apart)
    finally:
        joining.cancel()
