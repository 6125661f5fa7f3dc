"""Virtual environments of the peers, made when they are first needed, beside the folders that GGUF files become."""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from filelock import FileLock
from huggingface_hub import cached_assets_path

from sparse_train import artifacts
from sparse_train.errors import UserError

log = logging.getLogger(__name__)


def make_environment(name: str, install: tuple[str, ...], variables: Mapping[str, str]) -> Path:
    """The Python of the environment of `name`, in which `pip install INSTALL` has run with `variables` set.

    A line says so before anything is installed. Raises UserError where that fails.
    """
    version = artifacts.digest([sys.version, install, dict(variables)])
    folder = cached_assets_path("sparse-train", "peers", f"{name}-{version[:12]}")
    python, output, done = folder / "bin" / "python", folder / "install.log", folder / "DONE"
    with FileLock(f"{folder}.lock"):
        if done.exists():
            return python
        settings = "".join(f"{key}={value} " for key, value in variables.items())
        log.warning("%s: making an environment in %s, once: %spip install %s", name, folder, settings,
                    " ".join(install))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with output.open("w", encoding="utf-8") as log_file:
            for command in ([sys.executable, "-m", "venv", str(folder)],
                            [str(python), "-m", "pip", "install", *install]):
                if subprocess.run(command, stdout=log_file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                  env=os.environ | dict(variables)).returncode:
                    raise UserError(f"{name} cannot be installed: {_cause(output)}; make the package index reachable, "
                                    f"or leave {name} out of --peers (pip's whole output: {output})")
        done.touch()
    return python


def _cause(output: Path) -> str:
    lines = [line.strip() for line in output.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["no output"])[0].removeprefix("ERROR: ")
