"""Numbered work that is shared over the ranks and kept, so that a stopped stage goes on where it was.

    STAGE.partial/checkpoints/finished.jsonl    [part, number, result] per line, written by rank 0 after each round
"""

import contextlib
import functools
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparse_train import dist
from sparse_train.artifacts import parse_json, write_text
from sparse_train.jobs.job import Job, Stopped, finished_file
from sparse_train.stopping import StopMonitor
from sparse_train.tasks import ForEach


class Ledger:
    """In each round every rank makes one piece of work; the results do not depend on how many ranks there are, since
    each piece is made as a whole by one of them. Piece i is that of rank i % world_size, so a rank may keep what it
    needs again for another part's piece i. Where the ranks make a piece `together`, each makes all of them."""

    def __init__(self, job: Job, monitor: StopMonitor, num_parts: int, together: bool = False):
        """Collective. `num_parts`: of which the work consists, for the progress; they take about equally long."""
        self._per_round = 1 if together else dist.world_size()
        self._job, self._monitor, self._file = job, monitor, finished_file(job.out)
        self._num_parts, self._part_numbers = num_parts, itertools.count()
        self._finished: dict[tuple[str, int], Any] = dist.from_rank_0(_read(self._file) if dist.rank() == 0 else None)
        if dist.rank() == 0:
            job.require_newest_attempt()
            self._file.parent.mkdir(exist_ok=True)
            # Without half a line at its end; a new file, since an attempt that was cut off may still append to the old.
            write_text(self._file, "".join(map(_line, self._finished, self._finished.values())))

    def part(self, name: str) -> ForEach:
        """What makes the pieces of the next part. Collective; raises Stopped, on every rank, after a round in which a
        signal came or the deadline came near."""
        progress = self._job.progress_of_part(next(self._part_numbers), self._num_parts, name)
        return functools.partial(self._for_each, name, progress)

    def _for_each(self, name: str, progress: Callable[[int, int], None], count: int,
                  work: Callable[[int], Any]) -> list[Any]:
        for first in range(0, count, self._per_round):
            last = min(first + self._per_round, count)
            missing = [number for number in range(first, last) if (name, number) not in self._finished]
            if missing:
                mine = first + dist.rank() % self._per_round
                results = dist.gather_objects(work(mine) if mine in missing else None)
                self._add({(name, number): results[number - first] for number in missing})
                if dist.rank() == 0:
                    progress(last, count)
                if dist.any_rank(self._monitor.end_step()):
                    dist.barrier()  # the first rank to exit ends the job step
                    raise Stopped
        return [self._finished[name, number] for number in range(count)]

    def _add(self, new: dict[tuple[str, int], Any]) -> None:
        self._finished |= new
        if dist.rank() == 0:
            self._job.require_newest_attempt()
            with open(self._file, "a", encoding="utf-8") as file:
                file.writelines(map(_line, new, new.values()))


def num_finished(folder: Path) -> int:
    """Pieces of work that an unfinished folder keeps."""
    return len(_read(finished_file(folder)))


def _line(key: tuple[str, int], result: Any) -> str:
    return json.dumps([*key, result]) + "\n"


def _read(file: Path) -> dict[tuple[str, int], Any]:
    finished = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []:
        with contextlib.suppress(ValueError):  # half a line, where a process was killed or a node died
            name, number, result = parse_json(line)
            finished[name, number] = result
    return finished
