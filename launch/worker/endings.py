"""How the processes of an attempt ended, as files that are readable from any node.

    RUN/logs/STAGE/endings/ATTEMPT/RANK.json       how that rank ended; missing where it was killed
    RUN/logs/STAGE/endings/ATTEMPT/RANK.reserved   until then: room for it, since the disk may be full at the end
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
_MOST_TELLING_FIRST: tuple[Status, ...] = ("mistake", "broken", "stopped", "lost", "finished")
STOP_PATIENCE_S = 120  # that ranks have to save when a run is stopped
_MAX_CHARACTERS = 2000  # of a message
_RESERVED_BYTES = 16384  # such a message in JSON, where a character may take six bytes and more


@dataclass(frozen=True)
class Ending:
    """How a process of a stage ended."""

    status: Status
    """mistake: the user's to mend, a full disk too; broken: an error of its own; lost: another rank fell silent or
    left; stopped: by a signal or the time limit, state saved. After the last two the same command continues."""
    message: str = ""
    rank: int = 0


_ENDING = TypeAdapter(Ending)


def reserve_ending(logs: Path, attempt: Attempt, rank: int) -> None:
    """Take the room on the disk that write_ending needs."""
    folder = _folder(logs, attempt)
    folder.mkdir(parents=True, exist_ok=True)
    artifacts.write_text(folder / f"{rank}.reserved", " " * _RESERVED_BYTES)


def write_ending(logs: Path, attempt: Attempt, ending: Ending) -> None:
    """In the reserved room, else in a new file. Raises OSError where the disk has no room for that."""
    folder = _folder(logs, attempt)
    text = json.dumps(asdict(replace(ending, message=ending.message[:_MAX_CHARACTERS])))
    try:
        with open(folder / f"{ending.rank}.reserved", "r+", encoding="utf-8") as file:
            file.write(text.ljust(_RESERVED_BYTES))
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, folder / f"{ending.rank}.json")
    except FileNotFoundError:  # it ended before it had reserved any
        folder.mkdir(parents=True, exist_ok=True)
        artifacts.write_text(folder / f"{ending.rank}.json", text)


def newest_ending(logs: Path, records: Sequence[AttemptRecord]) -> Ending | None:
    """Of the last of `records`; None while none of its ranks has ended."""
    if not records or not any(_read_endings(logs, records[-1].attempt, records[-1].ranks).values()):
        return None
    return read_ending(logs, records[-1].attempt, records[-1].ranks)


def read_ending(logs: Path, attempt: Attempt, num_ranks: int) -> Ending:
    """Of all ranks, the ending that says most about the cause."""
    endings = [ending or _ending_of_killed(rank_log(logs, attempt.job, rank), rank)
               for rank, ending in _read_endings(logs, attempt, num_ranks).items()]
    return min(endings, key=_order_by_cause)


def has_ending_since(logs: Path, attempt: Attempt, since: float) -> bool:
    """Whether a rank of it has ended after `since`, in seconds since the epoch."""
    return any(file.stat().st_mtime >= since for file in _folder(logs, attempt).glob("*.json"))


def rank_log(logs: Path, job: str, rank: int) -> Path:
    """The file that submitit writes a rank's output to."""
    return logs / f"{job}_{rank}_log.out"


def _order_by_cause(ending: Ending) -> tuple[int, bool]:
    # Of lost ranks, the one that was killed is nearer to the cause than its peers, whose connections broke.
    return _MOST_TELLING_FIRST.index(ending.status), not ending.message.startswith("ended without")


def _folder(logs: Path, attempt: Attempt) -> Path:
    return logs / "endings" / str(attempt)


def _read_endings(logs: Path, attempt: Attempt, num_ranks: int) -> dict[int, Ending | None]:
    endings: dict[int, Ending | None] = dict.fromkeys(range(num_ranks))
    for rank in endings:
        with contextlib.suppress(UserError, ValidationError):  # missing, or damaged
            endings[rank] = _ENDING.validate_python(artifacts.read_json(_folder(logs, attempt) / f"{rank}.json"))
    return endings


def _ending_of_killed(log: Path, rank: int) -> Ending:
    """Of a process that left no ending. Where Python ended it, as by a failed import, the log ends with the error."""
    lines = [""]
    with contextlib.suppress(OSError), open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").strip().splitlines() or lines
    if re.match(r"[\w.]*(Error|Exception)\b", lines[-1]):
        return Ending("broken", f"ended before it began: {lines[-1]}", rank)
    cause = storage.describe_full(log.parent) or "it was killed, or ran out of memory"
    return Ending("lost", f"ended without a result; {cause}", rank)


def told_of_stop(stage: Stage, ending: Ending) -> str:
    """What a stage that was stopped came to, and what the same command will do."""
    if ending.status == "finished":
        return f"{stage.id} was finished; the same command goes on behind it"
    if not stage.is_distributed:
        return f"{stage.id} was stopped; the same command starts it again"
    if ending.status == "stopped":
        return f"{stage.id} was stopped and saved its state; the same command goes on from there"
    return f"{stage.id} ended before it could save; the same command goes on from its newest checkpoint"
