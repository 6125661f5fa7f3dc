"""Attempts at a stage, and how the processes of one came to their ends. All of it is files, readable from any node.

    RUN/logs/STAGE/attempts.jsonl     one line per attempt: id, job, nodes, ranks, the step it went on from, when
    RUN/logs/STAGE/attempt            the id of the newest: an older one that still runs somewhere must not write
    RUN/logs/STAGE/endings/ATTEMPT/RANK.json   how that rank ended
    RUN/logs/STAGE/endings/ATTEMPT/RANK.reserved   until then: room for it, since the disk may be full at the end
    RUN/logs/STAGE/requeues           the ids of those that afterwards.py, not SLURM itself, has requeued
"""

import contextlib
import json
import os
import re
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from sparse_train import artifacts, storage
from sparse_train.errors import UserError
from sparse_train.launch.worker.process_info import Place

Status = Literal["finished", "mistake", "broken", "lost", "stopped"]
EXIT_CODES: dict[Status, int] = {"finished": 0, "broken": 1, "mistake": 2, "stopped": 75, "lost": 76}
_LONGEST, _ROOM = 2000, 16384  # characters of a message; bytes, where each of them takes six and more


@dataclass(frozen=True)
class Ending:
    """How a process of a stage came to its end."""

    status: Status
    """mistake: the user's to mend, a full disk too; broken: an error of its own; lost: another rank fell silent or
    away; stopped: by a signal or the time limit, state saved. After the last two the same command goes on."""
    message: str = ""
    rank: int = 0


_ENDING = TypeAdapter(Ending)
_ATTEMPT = {"id": str, "job": str, "ranks": int, "from_step": int}


class Superseded(Exception):
    """A newer attempt is at work on the stage; this one must not write any more."""


def begin(logs: Path, place: Place, from_step: int) -> None:
    """To be called by one rank, before any other writes."""
    logs.mkdir(parents=True, exist_ok=True)  # an array's output is elsewhere
    artifacts.write_text(logs / "attempt", place.attempt)
    line = {"id": place.attempt, "job": place.job, "nodes": place.nodes, "ranks": place.num_ranks,
            "from_step": from_step, "started": time.time()}
    with open(logs / "attempts.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def require_newest(logs: Path, attempt: str) -> None:
    if (newest := (logs / "attempt").read_text(encoding="utf-8")) != attempt:
        raise Superseded(f"attempt {attempt} ends here: {newest} is at work on the stage")


def note_requeue(logs: Path, attempt: str) -> None:
    logs.mkdir(parents=True, exist_ok=True)  # where it ended before it began
    with open(logs / "requeues", "a", encoding="utf-8") as file:
        file.write(f"{attempt}\n")


def num_tries(logs: Path, attempt: str) -> int:
    """This one and those of its job that noted a requeue from the same step. SLURM's own requeues, of a preempted job
    or a lost node, are no fault of the job's and do not count."""
    job, _, restarts = attempt.rpartition(".")
    file = logs / "requeues"
    requeued = file.read_text(encoding="utf-8").split() if file.is_file() else []
    steps = {one["id"]: one["from_step"] for one in read_attempts(logs)}
    step, count = steps.get(attempt), 1
    for number in reversed(range(int(restarts))):
        one = f"{job}.{number}"  # without a step it ended before it began
        if step is not None and steps.get(one, step) != step:
            break
        step = steps.get(one, step)
        count += one in requeued
    return count


def read_attempts(logs: Path) -> list[dict[str, Any]]:
    """Oldest first."""
    found, file = [], logs / "attempts.jsonl"
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []:
        with contextlib.suppress(ValueError):  # half a line, of a node that died
            one = artifacts.parse_json(line)
            if isinstance(one, dict) and all(isinstance(one.get(key), kind) for key, kind in _ATTEMPT.items()):
                found.append(one)
    return found


def rank_log(logs: Path, job: str, rank: int) -> Path:
    """Where submitit has a rank's output written."""
    return logs / f"{job}_{rank}_log.out"


def reserve_ending(logs: Path, attempt: str, rank: int) -> None:
    """Take the room that write_ending needs."""
    folder = logs / "endings" / attempt
    folder.mkdir(parents=True, exist_ok=True)
    artifacts.write_text(folder / f"{rank}.reserved", " " * _ROOM)


def write_ending(logs: Path, attempt: str, ending: Ending) -> None:
    """In the room that was reserved, else in a file of its own; raises OSError where there is no room for that."""
    folder = logs / "endings" / attempt
    text = json.dumps(asdict(replace(ending, message=ending.message[:_LONGEST])))
    try:
        with open(folder / f"{ending.rank}.reserved", "r+", encoding="utf-8") as file:
            file.write(text.ljust(_ROOM))
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, folder / f"{ending.rank}.json")
    except FileNotFoundError:  # it ended before it had reserved any
        folder.mkdir(parents=True, exist_ok=True)
        artifacts.write_text(folder / f"{ending.rank}.json", text)


def newest_ending(logs: Path, tried: list[dict[str, Any]]) -> Ending | None:
    """Of the last of `tried`; None while none of its ranks has come to an end."""
    if not tried or not any(_endings_of(logs, tried[-1]["id"], tried[-1]["ranks"]).values()):
        return None
    return read_ending(logs, tried[-1]["id"], tried[-1]["ranks"])


def read_ending(logs: Path, attempt: str, num_ranks: int) -> Ending:
    """The most telling one: a mistake, an error of a rank's own, a stop; else a lost rank, which leaves nothing."""
    found = [ending or _untold(rank_log(logs, attempt.rpartition(".")[0], rank), rank)
             for rank, ending in _endings_of(logs, attempt, num_ranks).items()]
    order = ("mistake", "broken", "stopped", "lost", "finished")
    # Of lost ranks, one that says nothing tells more than its peers, who only heard the connection break.
    return min(found, key=lambda ending: (order.index(ending.status), not ending.message.startswith("ended without")))


def _endings_of(logs: Path, attempt: str, num_ranks: int) -> dict[int, Ending | None]:
    found: dict[int, Ending | None] = dict.fromkeys(range(num_ranks))
    for rank in found:
        with contextlib.suppress(UserError, ValidationError):  # it is not there, or broken
            found[rank] = _ENDING.validate_python(artifacts.read_json(logs / "endings" / attempt / f"{rank}.json"))
    return found


def _untold(log: Path, rank: int) -> Ending:
    """Of a process that left no ending. One that Python ended, such as in an import, has its error at the end of its
    log."""
    lines = [""]
    with contextlib.suppress(OSError), open(log, "rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").strip().splitlines() or lines
    if re.match(r"[\w.]*(Error|Exception)\b", lines[-1]):
        return Ending("broken", f"ended before it began: {lines[-1]}", rank)
    why = storage.fills(log.parent) or "it was killed, or ran out of memory"
    return Ending("lost", f"ended without a result; {why}", rank)
