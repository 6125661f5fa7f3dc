"""Comparable timings: candidates take turns, so that noise of the machine affects all of them alike."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

from sparse_train.kernels.cuda_graph import CudaGraph

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Timing:
    """Seconds of a call, or ratios of two calls, one per round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def low(self) -> float:
        """First quartile."""
        return self._quartile(0)

    @property
    def high(self) -> float:
        """Third quartile."""
        return self._quartile(2)

    def _quartile(self, which: int) -> float:
        if len(self.rounds) == 1:
            return self.rounds[0]
        return statistics.quantiles(self.rounds, n=4, method="inclusive")[which]

    def over(self, other: "Timing") -> "Timing":
        """The ratio to `other` in each round, in which both had the same noise."""
        return Timing(tuple(mine / theirs for mine, theirs in zip(self.rounds, other.rounds, strict=True)))

    def plain(self) -> dict[str, float]:
        """For JSON."""
        return {"median": self.median, "low": self.low, "high": self.high}


def interleave(candidates: Mapping[Key, Callable[[], object]], repeats: int,
               progress: Callable[[int, int], None] | None = None) -> dict[Key, Timing]:
    """Time each candidate `repeats` times, round robin, after one unmeasured round."""
    seconds: dict[Key, list[float]] = {name: [] for name in candidates}
    for round_ in range(repeats + 1):
        for name, candidate in candidates.items():
            start = time.perf_counter()
            candidate()
            if round_:
                seconds[name].append(time.perf_counter() - start)
        if progress:
            progress(round_, repeats)
    return {name: Timing(tuple(rounds)) for name, rounds in seconds.items()}


def graphed(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """`call` itself; on a GPU the graph of its launches, awaited."""
    if device.type == "cpu":
        return call
    graph = CudaGraph(call, device)

    def replay() -> None:
        graph()
        torch.cuda.synchronize(device)

    replay()
    replay()  # captured
    return replay
