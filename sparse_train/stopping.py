"""When a stage has to stop early: after a signal, and before the deadline; and how signals end a command."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

_SAME_EVENT_S = 2.0
"""A batch system may send both signals, or one to a process and its group, for one reason."""
_SAVE_S = 10.0
"""Assumed for a save until one has been measured."""


def handle_signals() -> None:
    """Make SIGTERM and SIGHUP end a command as Ctrl-C does; otherwise its processes would go on running, and what it
    has half written would stay.

    Only the first such signal counts: ranks get time to save.
    """
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]

    def end(*_) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in numbers:  # without SIGHUP under nohup, which ignores it
        signal.signal(number, end)


class StopMonitor:
    """While open, SIGTERM and SIGUSR2 (SLURM's warning) only set a flag: a save needs all ranks, which agree on it at
    the end of a step. A later SIGTERM ends the process at once; a later SIGUSR2 does not, since SLURM's warning may
    well follow the SIGTERM of a preemption and means the same.

    `deadline_s` is in seconds since the epoch; `save_s` is how long a save takes, if that is known.
    """

    def __init__(self, deadline_s: float | None, save_s: float | None = None):
        self._deadline_s = deadline_s
        self._save_s = _SAVE_S if save_s is None else save_s
        self._step_s = 0.0
        self._step_start = time.monotonic()
        self._signal_time: float | None = None
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopMonitor":
        for number in (signal.SIGTERM, signal.SIGUSR2):
            self._previous_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._signal_time is None:
            self._signal_time = now
        elif number == signal.SIGTERM and now - self._signal_time > _SAME_EVENT_S:
            os._exit(128 + number)

    def begin_step(self) -> None:
        """Not needed after another step: what went before this one is not done again and says nothing of the next."""
        self._step_start = time.monotonic()

    def end_step(self) -> bool:
        """To be called after every step: whether this rank wants to stop, because of a signal, or because another step
        and a save would not fit before the deadline."""
        now = time.monotonic()
        # The first step is the longest, since it compiles; of later ones none is known before it.
        self._step_s = max(now - self._step_start, 0.5 * self._step_s)
        self._step_start = now
        if self._signal_time is not None:
            return True
        return self._deadline_s is not None and time.time() + 1.5 * (self._step_s + self._save_s) > self._deadline_s

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Measures the save inside, before or after end_step; it does not count as part of a step."""
        start = time.monotonic()
        yield
        self._save_s = time.monotonic() - start
        self._step_start += self._save_s
