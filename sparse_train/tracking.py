"""Metrics and progress of one stage: metrics.jsonl is the truth, wandb a guest.

    RUN/STAGE/metrics.jsonl      one line per logged step
    RUN/STAGE/wandb-id           drawn once; it stays beside the checkpoints, so every attempt continues the same run
    RUN/wandb/                   what wandb writes; RUN's name is the group, the stage's kind the job type

wandb's own step cannot go back, which a resumed training does: our global_step is the axis of every curve.
"""

import contextlib
import json
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparse_train.artifacts import parse_json, read_json, write_json, write_text
from sparse_train.config import WandbConfig

log = logging.getLogger(__name__)
_FINISH_S = 30
_LINE_S = 10  # between lines of progress in the log


class Tracker:
    """Appends one line per logged step to `folder`/metrics.jsonl, and tells wandb when it is configured.

    `stage` is its id in the run whose folder is `run`. A failing wandb is reported once and left alone; training goes
    on.
    """

    def __init__(self, folder: Path, run: Path, stage: str, config: dict[str, Any] | None = None,
                 wandb: WandbConfig | None = None):
        self.path = folder / "metrics.jsonl"
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._wandb = wandb and _Guest(folder, run, stage, config, wandb)

    def rewind(self, step: int) -> None:
        """Drop lines after `step`: a resumed job writes them again."""
        self._file.close()
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # a killed job may have left half a line
                if parse_json(line)["step"] <= step:
                    kept.append(line + "\n")
        # A new file, not a shorter one: on a node that was cut off, the last attempt may still append to its own.
        write_text(self.path, "".join(kept))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """`metrics` may nest one level, such as {"squarehead": {"0": 0.2}}; wandb sees squarehead/0."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        if self._wandb:
            self._wandb.log({"global_step": step, **_flat(metrics)})

    def close(self) -> None:
        self._file.close()
        if self._wandb:
            self._wandb.close()


def log_results(run: Path, stage: str, metrics: dict[str, Any], wandb: WandbConfig) -> None:
    """Tell wandb what a finished stage found: `metrics` as its summary, tables (scores.json, rows.json), pictures."""
    folder, guest = run / stage, _Guest(run / "logs" / stage, run, stage, None, wandb)
    guest.log(_flat({key: value for key, value in metrics.items() if isinstance(value, (int, float, dict))}))
    for file in sorted(folder.glob("*.json")):
        data = read_json(file)
        rows = data.get("rows") if isinstance(data, dict) else data
        if isinstance(rows, list) and rows and isinstance(rows[0], dict):
            guest.log_table(file.stem, [_flat(row) for row in rows])
    for file in sorted(folder.glob("*.png")):
        guest.log_picture(file)
    guest.close()


class _Guest:
    """One wandb run. Whatever wandb raises is not worth a training run: it is told once, and wandb left out."""

    def __init__(self, folder: Path, run: Path, stage: str, config: dict[str, Any] | None, spec: WandbConfig):
        self._run = None

        def start():
            import wandb

            self._run = wandb.init(
                project=spec.project, entity=spec.entity, mode=spec.mode, id=_kept_id(folder), resume="allow",
                name=f"{run.name}/{stage}", group=run.name, job_type=stage.partition("/")[0], dir=str(run),
                config=config)
            self._run.define_metric("*", step_metric="global_step")

        self._try(start)

    def log(self, metrics: dict[str, Any]) -> None:
        if self._run:
            self._try(lambda: self._run.log(metrics))

    def log_table(self, name: str, rows: list[dict[str, Any]]) -> None:
        def tell():
            from wandb import Table

            columns = list(dict.fromkeys(key for row in rows for key in row))
            self._run.log({name: Table(columns, [[row.get(key) for key in columns] for row in rows])})

        if self._run:
            self._try(tell)

    def log_picture(self, file: Path) -> None:
        def tell():
            from wandb import Image

            self._run.log({file.stem: Image(str(file))})

        if self._run:
            self._try(tell)

    def close(self) -> None:
        """Waits for wandb, but not for ever: a job that stops for its time limit has little of it left."""
        if self._run:
            ending = threading.Thread(target=lambda: self._try(self._run.finish), daemon=True)
            ending.start()
            ending.join(_FINISH_S)

    def _try(self, do: Callable[[], Any]) -> None:
        try:
            do()
        except Exception as error:
            log.warning("wandb failed and is left out from here on: %s", error)
            self._run = None


def _flat(metrics: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in metrics.items():
        found.update(_flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return found


def _kept_id(folder: Path) -> str:
    file = folder / "wandb-id"
    if not file.is_file():
        write_text(file, secrets.token_hex(8))
    return file.read_text(encoding="utf-8")


class Progress:
    """`progress(done, total, note)` for long work; the newest state stands in the file `path`, for who looks, and in a
    line of the log now and then.

    `guard` is called before each write; it raises when this process should not write any more.
    """

    def __init__(self, path: Path, guard: Callable[[], None] = lambda: None, seconds_between: float = 0.3):
        self._path, self._guard, self._pause, self._last = path, guard, seconds_between, 0.0
        self._first: tuple[int, float] | None = None
        self._told = -math.inf

    def __call__(self, done: int, total: int, note: str = "") -> None:
        self._first = self._first or (done, time.time())
        if time.monotonic() - self._last > self._pause or done >= total:
            self._last = time.monotonic()
            self._guard()
            if self._last - self._told > _LINE_S or done >= total:
                self._told = self._last
                print(f"{done}/{total} {note}", flush=True)
            first, since = self._first
            rate = (done - first) / max(time.time() - since, 1e-9)
            write_json(self._path, {"done": done, "total": total, "note": note, "time": time.time(),
                                    "seconds_left": (total - done) / rate if rate > 0 else None})
