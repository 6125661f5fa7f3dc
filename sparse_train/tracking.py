"""Metrics and progress of one stage. metrics.jsonl is the record; wandb gets a copy and may fail.

    RUN/STAGE/metrics.jsonl      one line per logged step
    RUN/STAGE/wandb-id           drawn once; kept beside the checkpoints, so that every attempt continues the same run
    RUN/wandb/                   wandb's files; RUN's name is the group, the stage's kind the job type

wandb's step counter cannot go back, as a resumed training does, so the axis of each curve is our global_step.
"""

import contextlib
import json
import logging
import math
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_train import extras
from sparse_train.artifacts import parse_json, read_json, write_json, write_text
from sparse_train.config import WandbConfig

if TYPE_CHECKING:
    from wandb import Run

log = logging.getLogger(__name__)
_FINISH_S = 30
_LOG_INTERVAL_S = 10  # between lines of progress in the log


class Tracker:
    """Appends one line per logged step to `folder`/metrics.jsonl, and sends it to wandb when that is configured.

    `stage` is its id in the run whose folder is `run`; `kind` is the stage's kind. When wandb fails, one warning is
    logged and training continues without it.
    """

    def __init__(self, folder: Path, run: Path, stage: str, kind: str, config: dict[str, Any] | None = None,
                 wandb: WandbConfig | None = None):
        self.path = folder / "metrics.jsonl"
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        self._wandb = _WandbRun(folder, run, stage, kind, config, wandb) if wandb else None

    def rewind(self, step: int) -> None:
        """Drop the lines after `step`, which a resumed job writes again."""
        self._file.close()
        lines = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # a killed job may have written half a line
                if parse_json(line)["step"] <= step:
                    lines.append(line + "\n")
        # A new file, not a truncated one: an attempt on a node that was cut off may still append to the old one.
        write_text(self.path, "".join(lines))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """`metrics` may nest one level, such as {"squarehead": {"0": 0.2}}; wandb sees squarehead/0."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        if self._wandb:
            self._wandb.log({"global_step": step, **_flatten(metrics)})

    def close(self) -> None:
        self._file.close()
        if self._wandb:
            self._wandb.close()


def log_results(run: Path, stage: str, kind: str, metrics: dict[str, Any], config: WandbConfig) -> None:
    """Send a finished stage to wandb: `metrics` as its summary, its tables (scores.json, rows.json) and pictures."""
    folder, wandb_run = run / stage, _WandbRun(run / "logs" / stage, run, stage, kind, None, config)
    wandb_run.log(_flatten({key: value for key, value in metrics.items() if isinstance(value, (int, float, dict))}))
    for file in sorted(folder.glob("*.json")):
        data = read_json(file)
        rows = data.get("rows") if isinstance(data, dict) else data
        if isinstance(rows, list) and rows and isinstance(rows[0], dict):
            wandb_run.log_table(file.stem, [_flatten(row) for row in rows])
    for file in sorted(folder.glob("*.png")):
        wandb_run.log_picture(file)
    wandb_run.close()


class _WandbRun:
    """One wandb run. Its errors never stop training: the first is logged, then wandb is disabled."""

    def __init__(self, folder: Path, run: Path, stage: str, kind: str, config: dict[str, Any] | None,
                 wandb: WandbConfig):
        self._run: Run | None = None
        with self._disabled_by_errors():
            self._run = _start_wandb(folder, run, stage, kind, config, wandb)

    def log(self, metrics: dict[str, Any]) -> None:
        if self._run:
            with self._disabled_by_errors():
                self._run.log(metrics)

    def log_table(self, name: str, rows: list[dict[str, Any]]) -> None:
        if self._run:
            with self._disabled_by_errors():
                from wandb import Table

                columns = list(dict.fromkeys(key for row in rows for key in row))
                self._run.log({name: Table([*columns], [[row.get(key) for key in columns] for row in rows])})

    def log_picture(self, file: Path) -> None:
        if self._run:
            with self._disabled_by_errors():
                from wandb import Image

                self._run.log({file.stem: Image(str(file))})

    def close(self) -> None:
        """Wait for wandb to finish, but not long: a job that stops for its time limit has little time."""
        if self._run:
            thread = threading.Thread(target=self._finish, args=(self._run,), daemon=True)
            thread.start()
            thread.join(_FINISH_S)

    def _finish(self, run: "Run") -> None:
        with self._disabled_by_errors():
            run.finish()

    @contextlib.contextmanager
    def _disabled_by_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            log.warning("wandb failed and is disabled from here on: %s", error)
            self._run = None


def _start_wandb(folder: Path, run: Path, stage: str, kind: str, config: dict[str, Any] | None,
                 spec: WandbConfig) -> "Run":
    try:
        import wandb
    except ModuleNotFoundError:
        extras.require("wandb")  # which says what to install
        raise
    wandb_run = wandb.init(
        project=spec.project, entity=spec.entity, mode=spec.mode, id=_wandb_id(folder), resume="allow",
        name=f"{run.name}/{stage}", group=run.name, job_type=kind, dir=str(run), config=config)
    wandb_run.define_metric("*", step_metric="global_step")
    return wandb_run


def _wandb_id(folder: Path) -> str:
    file = folder / "wandb-id"
    if not file.is_file():
        write_text(file, secrets.token_hex(8))
    return file.read_text(encoding="utf-8")


def _flatten(metrics: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in metrics.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}/"))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


class Progress:
    """`progress(done, total, note)` for long work: writes the latest state to `path` for `status`, at most once per
    `seconds_between`, and to the log every 10 s.

    `require_newest_attempt` is called before each write; it raises when this process must not write any more.
    """

    def __init__(self, path: Path, require_newest_attempt: Callable[[], None] = lambda: None,
                 seconds_between: float = 0.3):
        self._path, self._require_newest_attempt, self._interval_s = path, require_newest_attempt, seconds_between
        self._start: tuple[int, float] | None = None
        """Count and time of the first call."""
        self._written = self._logged = -math.inf

    def __call__(self, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if self._start is None:
            self._start = done, now
        if now - self._written <= self._interval_s and done < total:
            return
        self._written = now
        self._require_newest_attempt()
        if now - self._logged > _LOG_INTERVAL_S or done >= total:
            self._logged = now
            log.info("%d/%d %s", done, total, note)
        first, since = self._start
        rate = (done - first) / max(now - since, 1e-9)
        write_json(self._path, {"done": done, "total": total, "note": note, "time": time.time(),
                                "seconds_left": (total - done) / rate if rate > 0 else None})
