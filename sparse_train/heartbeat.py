"""Detect ranks that stop responding; without this the others might wait for them in a collective for ever.

Each rank sends heartbeats to a key-value store on rank 0, from a separate thread. Rank 0 names the ranks whose last
heartbeat is too old; the others notice when rank 0 no longer answers. Each rank then ends its own process from that
thread, because its main thread may be stuck in the collective.

A rank whose main thread hangs still sends heartbeats, and the collective of the others times out without naming the
rank. So a heartbeat carries the line that the main thread is at, and rank 0 logs the lines of all ranks when its main
thread makes no progress. Where no collective may time out, because a rank may work alone for hours, it also carries
the CPU time of the main thread: one that takes none, and does not wait in a collective, hangs.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType

import deepspeed
from torch import distributed
from torch.distributed import TCPStore

from sparse_train import dist

log = logging.getLogger(__name__)
_VERDICT = "silent"  # the store's key of the text that rank 0 sends to all ranks
_MOST_NAMED = 8
_WAITING = tuple(os.path.dirname(package.__file__ or "") + os.sep for package in (distributed, deepspeed))
"""Folders of code that waits for other ranks: collectives, and under ZeRO-3 DeepSpeed for those that it has begun."""


@dataclass(frozen=True)
class _Beat:
    """The last heartbeat of a rank that rank 0 has seen."""

    received: float
    moved: float
    """When it was at another position, or had taken less CPU time."""
    number: str = ""
    cpu_ms: str = ""
    """Of its main thread."""
    waits: bool = False
    """Whether its main thread waits for other ranks."""
    position: str = ""
    """Of its main thread."""


class Heartbeat:
    """Sends and watches heartbeats from construction until stop().

    `stall`: on rank 0, the text logged when its main thread has made no progress for silence_s; empty while it does.
    """

    def __init__(self, host: str, address: str, silence_s: float, on_silence: Callable[[str], None],
                 watches_hangs: bool = False):
        """Collective. `host`: this rank's, for messages. `address`: rank 0's. `silence_s`: seconds without a heartbeat
        after which a rank counts as silent. `on_silence(text)` is called from a thread and should not return; with
        `watches_hangs` also where a main thread has taken no CPU time for as long."""
        self._rank, self._silence_s, self._on_silence = dist.rank(), silence_s, on_silence
        self._watches_hangs = watches_hangs
        self._hosts = dist.gather_objects(host)
        self._interval_s = min(5.0, silence_s / 6)
        self._stopped = threading.Event()
        self._store = self._join_store(address)
        self._answered = self._moved = time.monotonic()
        self._position, self.stall = ("", 0), ""
        self._beats = [_Beat(self._answered, self._answered) for _ in self._hosts]
        for target in (self._send_beats, self._watch_rank_0):
            threading.Thread(target=target, daemon=True).start()

    def stop(self) -> None:
        """Call it before the process group is closed, once every rank is past its last collective."""
        self._stopped.set()

    def announce(self, event: str) -> None:
        """Release the ranks that wait_for(event)."""
        self._store.set(event, "")

    def wait_for(self, event: str) -> None:
        """Wait until another rank announces `event`. Unlike a collective this has no timeout: only a silent rank ends
        it."""
        while not self._store.check([event]):
            time.sleep(min(1.0, self._interval_s))

    def _join_store(self, address: str) -> TCPStore:
        timeout = timedelta(seconds=self._silence_s)
        if self._rank == 0:
            store = TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=timeout)
            dist.from_rank_0(store.port)
            return store
        port = dist.from_rank_0(None)
        return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)

    def _send_beats(self) -> None:
        """Blocks where the network is cut; _watch_rank_0 notices by the time of the last answer."""
        number = 0
        while not self._stopped.wait(self._interval_s):
            number += 1
            try:
                self._store.set(str(self._rank), f"{number} {_cpu_ms_of_main_thread()} {_waits()} {_position()}")
                verdict = self._store.get(_VERDICT).decode() if self._store.check([_VERDICT]) else ""
                if self._rank == 0:
                    self._check_ranks()
            except Exception:  # a broken connection is silence, which _watch_rank_0 judges by how long it lasts
                continue
            self._answered = time.monotonic()
            if verdict:
                self._report(verdict)

    def _check_ranks(self) -> None:
        """On rank 0: find ranks whose last heartbeat is too old, and those that hang."""
        self._receive_beats()
        now = time.monotonic()
        silent = [rank for rank, beat in enumerate(self._beats) if now - beat.received > self._silence_s]
        hung = self._hung(now) if self._watches_hangs else []
        if silent or hung:
            verdict = self._describe_silence(silent) if silent else (
                f"no CPU time for {self._silence_s:g} s: {self._positions(hung)}")
            self._store.set(_VERDICT, verdict)
            time.sleep(2 * self._interval_s)  # the others read it before the store ends with this process
            self._report(verdict)
        self._check_for_stall()

    def _receive_beats(self) -> None:
        now, ranks = time.monotonic(), [rank for rank in range(len(self._beats)) if self._store.check([str(rank)])]
        for rank, value in zip(ranks, self._store.multi_get([str(rank) for rank in ranks]), strict=True):
            number, cpu_ms, waits, position = value.decode().split(" ", 3)
            last = self._beats[rank]
            if number != last.number:
                moved = last.moved if (cpu_ms, position) == (last.cpu_ms, last.position) else now
                self._beats[rank] = _Beat(now, moved, number, cpu_ms, waits == "True", position)

    def _hung(self, now: float) -> list[int]:
        """Ranks that neither work nor wait for another; all of them where each waits for another."""
        idle = [rank for rank, beat in enumerate(self._beats) if now - beat.moved > self._silence_s]
        alone = [rank for rank in idle if not self._beats[rank].waits]
        return alone or (idle if len(idle) == len(self._beats) else [])

    def _check_for_stall(self) -> None:
        # The position alone is not enough: each look at a healthy training may find it at the line that waits for the
        # GPU.
        now, position = time.monotonic(), (_position(), dist.num_sums())
        if position != self._position:
            self._position, self._moved, self.stall = position, now, ""
        elif not self.stall and now - self._moved > self._silence_s:
            self.stall = self._describe_stall()
            log.warning("%s", self.stall)

    def _watch_rank_0(self) -> None:
        while not self._stopped.wait(self._interval_s):
            if self._rank and time.monotonic() - self._answered > self._silence_s:
                self._report(self._describe_silence([0]))

    def _describe_silence(self, ranks: list[int]) -> str:
        return f"rank {self._with_hosts(ranks)} went silent for {self._silence_s:g} s"

    def _describe_stall(self) -> str:
        return f"no progress for {self._silence_s:g} s: {self._positions(range(len(self._beats)))}"

    def _positions(self, ranks: Iterable[int]) -> str:
        ranks_at: dict[str, list[int]] = {}
        for rank in ranks:
            ranks_at.setdefault(self._beats[rank].position, []).append(rank)
        rarest_first = sorted(ranks_at.items(), key=lambda item: len(item[1]))
        return "; ".join(f"rank {self._with_hosts(there)} in {position}" for position, there in rarest_first)

    def _with_hosts(self, ranks: list[int]) -> str:
        names = [f"{rank} ({self._hosts[rank]})" for rank in ranks[:_MOST_NAMED]]
        return ", ".join(names + ["..."] * (len(ranks) > _MOST_NAMED))

    def _report(self, text: str) -> None:
        if not self._stopped.is_set():
            self._on_silence(text)


def _cpu_ms_of_main_thread() -> int:
    return int(1000 * time.clock_gettime(time.pthread_getcpuclockid(threading.main_thread().ident or 0)))


def _frame() -> FrameType:
    """The innermost one of the main thread."""
    return sys._current_frames()[threading.main_thread().ident or 0]


def _waits() -> bool:
    return _frame().f_code.co_filename.startswith(_WAITING)


def _position() -> str:
    """The main thread's function, file and line."""
    frame = _frame()
    return f"{frame.f_code.co_name} ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})"
