"""Exceptions of a stage as endings, which say whose fault it was and whether another attempt may succeed."""

import errno
import logging
from collections.abc import Callable
from pathlib import Path

from torch.distributed import DistError

from sparse_train import storage
from sparse_train.errors import UserError
from sparse_train.jobs.job import Stopped
from sparse_train.launch.worker.attempts import Superseded
from sparse_train.launch.worker.endings import Ending

log = logging.getLogger(__name__)


def run_to_ending(run_stage: Callable[[], None], rank: int, run: Path = Path()) -> Ending | None:
    """Call `run_stage`, log what it raises, and return how it ended; None where another attempt has taken over.

    `run`: the run's folder, for errors of a full disk that name no file.
    """
    try:
        run_stage()
        return Ending("finished", rank=rank)
    except Stopped:
        return Ending("stopped", "it received a stop signal, or its time ran out", rank)
    except UserError as error:
        log.error("%s", error)
        return Ending("mistake", str(error), rank)
    except Superseded as error:
        log.error("%s", error)
        return None
    except Exception as error:
        log.exception("the stage failed")
        if line := storage.explain(error, run):
            log.error("%s", line)
            return Ending("mistake", line, rank)
        return Ending("lost" if _is_transient(error) else "broken", _describe(error), rank)


def _is_transient(error: Exception) -> bool:
    """A lost peer, or shared storage that failed for a moment. gloo raises plain RuntimeErrors, the other backends
    subclasses of DistError."""
    if isinstance(error, OSError):
        return error.errno in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)
    if isinstance(error, DistError):
        return True
    return isinstance(error, RuntimeError) and ("Connection" in str(error) or "gloo" in str(error))


def _describe(error: Exception) -> str:
    last_line = (str(error).strip().splitlines() or [""])[-1]
    return "; ".join([f"{type(error).__name__}: {last_line}", *getattr(error, "__notes__", ())])
