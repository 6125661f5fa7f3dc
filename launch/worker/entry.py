"""The function that submitit calls in each process of a stage. Importing it loads nothing that only ranks need."""

import signal
from pathlib import Path

from sparse_train.launch.worker import attempts
from sparse_train.launch.worker.endings import Ending, write_ending
from sparse_train.launch.worker.process_info import current_process


def process(run_folder: str, stage_id: str, port: int | None = None) -> None:
    """Run one stage of the run in `run_folder`; see process.work. A failed import is recorded as the ending."""
    # During the imports, which take seconds, submitit's handlers would fail on a signal, or swallow it.
    for number in (signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    try:
        from sparse_train.launch.worker.process import work  # imports DeepSpeed, which only the ranks need
    except Exception as error:
        info, logs = current_process(), Path(run_folder) / "logs" / stage_id
        if info.rank == 0:
            attempts.begin(logs, info, 0)
        message = f"could not be started: {type(error).__name__}: {' '.join(str(error).split())}"
        write_ending(logs, info.attempt, Ending("broken", message, info.rank))
        raise
    work(run_folder, stage_id, port)
