"""Environments for packages that are none of ours, or of another version."""

import subprocess
import venv
from pathlib import Path

import torch


def python_with(folder: Path, *packages: str) -> Path:
    """A Python in a new environment with `packages`, and this one's torch and other packages behind them. Raises
    OSError without an index."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    done = subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", *packages], capture_output=True,
                          text=True)
    if done.returncode:
        raise OSError(f"no {packages[0]}: {done.stderr.strip().splitlines()[-1:]}")
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "shared.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n", encoding="utf-8")
    return python
