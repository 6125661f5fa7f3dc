"""What a stage is given to work with."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sparse_train.config import RunConfig


@dataclass(frozen=True)
class Job:
    config: RunConfig
    out: Path
    """The folder to write; it is published under the stage's name when `run` returns."""
    inputs: dict[str, Path | str]
    """Finished stages by their ids, such as dense or finetune/squarehead; dense may be a hub name."""
    progress: Callable[[int, int, str], None]
    stage: str
    """Its id, such as finetune/squarehead."""
    level: int = 0
    """prune: which of config.prune.levels; benchmark: which of config.benchmark.devices."""
    deadline: float | None = None
    """When the process will be ended, in seconds since the epoch; known to rank 0."""
    guard: Callable[[], None] = lambda: None
    """Raises when a newer attempt is at work on the stage; to be called before files change that it may use."""

    @property
    def loss(self) -> str:
        """finetune: which of config.finetune.losses."""
        return self.stage.rpartition("/")[2]

    def input_of(self, kind: str) -> Path | str:
        """The one input whose stage is `kind`, such as prune."""
        (path,) = (path for stage, path in self.inputs.items() if stage.partition("/")[0] == kind)
        return path


class Stopped(BaseException):
    """A stop signal or the deadline ended the stage early; run it again to go on. No library shall swallow it."""
