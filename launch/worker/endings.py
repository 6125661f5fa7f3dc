"""How the processes of an attempt ended, recorded in files that every node can read.

    RUN/logs/STAGE/endings/ATTEMPT/RANK.json       how that rank ended; missing where it was killed
    RUN/logs/STAGE/endings/ATTEMPT/RANK.reserved   until then: disk space for it, since the disk may be full at the end
"""

import contextlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from sparse_train import artifacts, storage
from sparse_train.errors import UserError
from sparse_train.jobs.stage import Stage
from sparse_train.launch.worker.attempts import AttemptRecord
from sparse_train.launch.worker.process_info import Attempt

Status = Literal["finished", "mistake", "broken", "lost", "stopped"]
EXIT_CODES: dict[Status, int] = {"finished": 0, "broken": 1, "mistake": 2, "stopped": 75, "lost": 76}
_NEAREST_TO_CAUSE_FIRST: tuple[Status, ...] = ("mistake", "broken", "stopped", "lost", "finished")
STOP_PATIENCE_S = 120  # for ranks to save when a run is stopped
_MAX_CHARACTERS = 2000  # of a message
_RESERVED_BYTES = 16384  # of such a message in JSON, where a character may take six bytes and more


@dataclass(frozen=True)
class Ending:
    """How a process of a stage ended."""

    status: Status
    """mistake: the user can correct it, such as a full disk; broken: an error in the code; lost: another rank fell
    silent or ended; stopped: by a signal or the time limit, after saving. After the last two the same command
    continues."""
    message: str = ""
    rank: int = 0


_ENDING = TypeAdapter(Ending)


def reserve_ending(logs: Path, attempt: Attempt, rank: int) -> None:
    """Reserve the disk space that write_ending needs."""
    folder = _folder(logs, attempt)
    folder.mkdir(parents=True, exist_ok=True)
    artifacts.write_text(folder / f"{rank}.reserved", " " * _RESERVED_BYTES)


def write_ending(logs: Path, attempt: Attempt, ending: Ending) -> None:
    """Write to the reserved file, or to a new one where none was reserved. Raises OSError where the disk is full."""
    folder = _folder(logs, attempt)
    text = json.dumps(asdict(replace(ending, message=ending.message[:_MAX_CHARACTERS])))
    try:
        with open(folder / f"{ending.rank}.reserved", "r+", encoding="utf-8") as file:
            file.write(text.ljust(_RESERVED_BYTES))
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, folder / f"{ending.rank}.json")
    except FileNotFoundError:  # it ended before it reserved one
        folder.mkdir(parents=True, exist_ok=True)
        artifacts.write_text(folder / f"{ending.rank}.json", text)


def newest_ending(logs: Path, records: Sequence[AttemptRecord]) -> Ending | None:
    """The ending of the last attempt in `records`; None while none of its ranks has ended."""
    if not records or not any(_read_endings(logs, records[-1].attempt, records[-1].ranks).values()):
        return None
    return read_ending(logs, records[-1].attempt, records[-1].ranks)


def read_ending(logs: Path, attempt: Attempt, num_ranks: int) -> Ending:
    """The ending, among those of all ranks, that is nearest to the cause."""
    endings = [ending or _ending_of_killed(rank_log(logs, attempt.job, rank), rank)
               for rank, ending in _read_endings(logs, attempt, num_ranks).items()]
    return min(endings, key=_order_by_cause)


def has_ending_since(logs: Path, attempt: Attempt, since: float) -> bool:
    """Whether a rank of the attempt has ended after `since`, in seconds since the epoch."""
    return any(file.stat().st_mtime >= since for file in _folder(logs, attempt).glob("*.json"))


def rank_log(logs: Path, job: str, rank: int) -> Path:
    """The file that submitit writes a rank's output to."""
    return logs / f"{job}_{rank}_log.out"


def _order_by_cause(ending: Ending) -> tuple[int, bool]:
    # A rank that was killed is nearer to the cause than its peers, whose connections broke.
    return _NEAREST_TO_CAUSE_FIRST.index(ending.status), not ending.message.startswith("ended without")


def _folder(logs: Path, attempt: Attempt) -> Path:
    return logs / "endings" / str(attempt)


def _read_endings(logs: Path, attempt: Attempt, num_ranks: int) -> dict[int, Ending | None]:
    endings: dict[int, Ending | None] = dict.fromkeys(range(num_ranks))
    for rank in endings:
        with contextlib.suppress(UserError, ValidationError):  # missing, or damaged
            endings[rank] = _ENDING.validate_python(artifacts.read_json(_folder(logs, attempt) / f"{rank}.json"))
    return endings


def _ending_of_killed(log: Path, rank: int) -> Ending:
    """The ending of a process that wrote none. Where an exception ended it, the log ends with that."""
    lines = [""]
    with contextlib.suppress(OSError), open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").strip().splitlines() or lines
    if re.match(r"[\w.]*(Error|Exception)\b", lines[-1]):
        return Ending("broken", f"ended before it began: {lines[-1]}", rank)
    cause = storage.describe_full(log.parent) or "it was killed, or ran out of memory"
    return Ending("lost", f"ended without a result; {cause}", rank)


def describe_stop(stage: Stage, ending: Ending) -> str:
    """How far a stopped stage is, and what the same command will do."""
    if ending.status == "finished":
        return f"{stage.id} was finished; the same command continues after it"
    if not stage.is_distributed:
        return f"{stage.id} was stopped; the same command starts it again"
    if ending.status == "stopped":
        return f"{stage.id} was stopped and saved its state; the same command continues from there"
    return f"{stage.id} ended before it could save; the same command continues from what it saved last"
