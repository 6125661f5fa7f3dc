"""What a stage gets to work with."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sparse_train.config import RunConfig
from sparse_train.jobs.stage import Kind, Stage


@dataclass(frozen=True)
class Input:
    """The result of a finished stage, which another stage reads."""

    stage: Stage
    path: Path | str
    """Its folder; for an external dense model perhaps a name on the hub."""


@dataclass(frozen=True)
class Job:
    config: RunConfig
    stage: Stage
    out: Path
    """The folder to write to; it is published under the stage's id when the stage's `run` returns."""
    inputs: tuple[Input, ...]
    """In the order of stage.inputs."""
    progress: Callable[[int, int, str], None]
    deadline_s: float | None = None
    """When the process will be ended, in seconds since the epoch; known to rank 0 only."""
    require_newest_attempt: Callable[[], None] = lambda: None
    """Raises where a newer attempt at the stage has started. To be called before files change that it may use."""

    def path_of(self, kind: Kind) -> Path | str:
        """The path of the one input of that kind."""
        (path,) = (source.path for source in self.inputs if source.stage.kind is kind)
        return path

    def progress_of_part(self, index: int, count: int, note: str) -> Callable[[int, int], None]:
        """`progress` for part `index` of `count`, which take equally long."""
        return lambda done, total: self.progress(index * total + done, count * total, note)


def finished_file(folder: Path) -> Path:
    """In a stage's unfinished folder: the work that the ledger keeps, a line each."""
    return folder / "checkpoints" / "finished.jsonl"


class Stopped(BaseException):
    """A stop signal or the deadline ended the stage early; run it again to continue.

    It is a BaseException, so that no library's `except Exception` swallows it.
    """
