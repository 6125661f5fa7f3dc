"""Run folders below a folder."""

from dataclasses import dataclass
from pathlib import Path

from sparse_train.errors import describe_error
from sparse_train.launch.run.folder import CONFIG


@dataclass(frozen=True)
class RunFolder:
    started: float
    """When its config was written, in seconds since the epoch."""
    problem: str = ""
    """Why it cannot be read."""


def run_folders(folder: Path) -> list[Path]:
    """The run in `folder`, or those of a sweep."""
    if (folder / CONFIG).is_file():
        return [folder]
    return sorted(find_runs(folder, 1)) or [folder]


def find_runs(folder: Path, depth: int) -> dict[Path, RunFolder]:
    """Run folders up to `depth` below `folder`, and folders that cannot be read."""
    runs: dict[Path, RunFolder] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        try:
            if (path / CONFIG).is_file():
                runs[path] = RunFolder((path / CONFIG).stat().st_mtime)
            elif depth > 1 and path.is_dir():
                runs |= find_runs(path, depth - 1)
        except OSError as error:
            runs[path] = RunFolder(0.0, describe_error(error))
    return runs
