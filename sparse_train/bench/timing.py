"""Timings that can be compared: candidates take turns, so that the machine's noise falls on all of them alike."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median, and the first and third quartile."""

    median: float
    low: float
    high: float


def interleave(candidates: dict[str, Callable[[], object]], repeats: int,
               progress: Callable[[int, int], None] | None = None) -> dict[str, Timing]:
    """Time each candidate `repeats` times, round robin, after one unmeasured round."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(repeats + 1):
        for name, candidate in candidates.items():
            start = time.perf_counter()
            candidate()
            if round_:
                seconds[name].append(time.perf_counter() - start)
        if progress:
            progress(round_, repeats)
    return {name: Timing(statistics.median(found), *_quartiles(found)) for name, found in seconds.items()}


def _quartiles(found: list[float]) -> tuple[float, float]:
    if len(found) == 1:
        return found[0], found[0]
    first, _, third = statistics.quantiles(found, n=4, method="inclusive")
    return first, third
