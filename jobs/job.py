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
    loss: str = ""
    """finetune: which of config.finetune.losses."""
    level: int = 0
    """prune: which of config.prune.levels."""

    def input_of(self, kind: str) -> Path | str:
        """The one input whose stage is `kind`, such as prune."""
        (path,) = (path for stage, path in self.inputs.items() if stage.partition("/")[0] == kind)
        return path


class Stopped(Exception):
    """A stop signal ended the stage early; run it again to go on."""
