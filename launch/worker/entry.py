"""What submitit calls in each process of a stage. It is light, so that a launcher need not load what ranks need."""

import signal
from pathlib import Path

from sparse_train.launch.worker import attempts
from sparse_train.launch.worker.endings import Ending, write_ending
from sparse_train.launch.worker.process_info import current_process


def process(run_folder: str, stage_id: str, port: int | None = None) -> None:
    """What submitit calls in each process of a stage."""
    # The imports take seconds; submitit's handlers would count a warning in them as an error, or swallow it.
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    try:
        from sparse_train.launch.worker.process import work  # brings DeepSpeed, which only the ranks need
    except Exception as error:
        info, logs = current_process(), Path(run_folder) / "logs" / stage_id
        if info.rank == 0:
            attempts.begin(logs, info, 0)
        told = f"could not be started: {type(error).__name__}: {' '.join(str(error).split())}"
        write_ending(logs, info.attempt, Ending("broken", told, info.rank))
        raise
    work(run_folder, stage_id, port)
