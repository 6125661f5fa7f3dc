"""Metrics and progress of one stage: metrics.jsonl is the truth, wandb a guest.

Progress of long work stands in a small file, which the launcher shows.
"""

import contextlib
import json
import logging
import secrets
import time
from pathlib import Path
from typing import Any

from sparse_train.artifacts import write_json, write_text
from sparse_train.config import WandbConfig

log = logging.getLogger(__name__)


class Tracker:
    """Appends one line per logged step to `folder`/metrics.jsonl, and tells wandb when it is configured.

    `name` is wandb's display name; the id is drawn once and kept in `folder`, so that a resumed job continues its run.
    A failing wandb is reported once and left alone; training goes on.
    """

    def __init__(self, folder: Path, name: str, config: dict[str, Any] | None = None,
                 wandb: WandbConfig | None = None):
        self.path = folder / "metrics.jsonl"
        self._file = open(self.path, "a")  # noqa: SIM115 - closed by close()
        self._wandb = None
        if wandb is not None:
            with self._guest():
                import wandb as package
                self._wandb = package.init(
                    project=wandb.project, entity=wandb.entity, mode=wandb.mode, id=_kept_id(folder), name=name,
                    resume="allow", dir=str(folder), config=config)

    def rewind(self, step: int) -> None:
        """Drop lines after `step`: a resumed job writes them again."""
        self._file.close()
        kept = []
        for line in self.path.read_text().splitlines():
            with contextlib.suppress(ValueError):  # a killed job may have left half a line
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
        self.path.write_text("".join(kept))
        self._file = open(self.path, "a")  # noqa: SIM115

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """`metrics` may nest one level, such as {"squarehead": {"0": 0.2}}; wandb sees squarehead/0."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        if self._wandb is not None:
            flat = {}
            for key, value in metrics.items():
                flat.update({f"{key}/{k}": v for k, v in value.items()} if isinstance(value, dict) else {key: value})
            with self._guest():
                self._wandb.log(flat, step=step)

    def close(self) -> None:
        self._file.close()
        if self._wandb is not None:
            with self._guest():
                self._wandb.finish()

    @contextlib.contextmanager
    def _guest(self):
        try:
            yield
        except Exception as error:  # whatever wandb raises is not worth a training run
            log.warning("wandb failed and is left out from here on: %s", error)
            self._wandb = None


def _kept_id(folder: Path) -> str:
    file = folder / "wandb-id"
    if not file.is_file():
        write_text(file, secrets.token_hex(8))
    return file.read_text()


class Progress:
    """`progress(done, total, note)` for long work; the newest state stands in the file `path`, for the launcher."""

    def __init__(self, path: Path, seconds_between: float = 0.3):
        self._path, self._pause, self._last = path, seconds_between, 0.0

    def __call__(self, done: int, total: int, note: str = "") -> None:
        if time.monotonic() - self._last > self._pause or done >= total:
            self._last = time.monotonic()
            write_json(self._path, {"done": done, "total": total, "note": note})
