"""Detect ranks that stop responding; without this the others might wait for them in a collective for ever.

Each rank sends heartbeats to a key-value store on rank 0, from a separate thread. Rank 0 names the ranks whose last
heartbeat is too old; the others notice when rank 0 no longer answers. Each rank then ends its own process from that
thread, because its main thread may be stuck in the collective.

A rank whose main thread hangs still sends heartbeats, and the collective of the others times out without naming the
rank. So a heartbeat carries the line that the main thread is at, and rank 0 logs the lines of all ranks when its main
thread makes no progress.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import TCPStore

from sparse_train import dist

log = logging.getLogger(__name__)
_VERDICT = "silent"  # the store's key of the text that rank 0 sends to all ranks
_MOST_NAMED = 8


@dataclass(frozen=True)
class _Beat:
    """The last heartbeat of a rank that rank 0 has seen."""

    received: float
    number: str = ""
    position: str = ""
    """Of its main thread."""


class Heartbeat:
    """Sends and watches heartbeats from construction until stop().

    `stall`: on rank 0, the text logged when its main thread has made no progress for silence_s; empty while it does.
    """

    def __init__(self, host: str, address: str, silence_s: float, on_silence: Callable[[str], None]):
        """Collective. `host`: this rank's, for messages. `address`: rank 0's. `silence_s`: seconds without a heartbeat
        after which a rank counts as silent. `on_silence(text)` is called from a thread and should not return."""
        self._rank, self._silence_s, self._on_silence = dist.rank(), silence_s, on_silence
        self._hosts = dist.gather_objects(host)
        self._interval_s = min(5.0, silence_s / 6)
        self._stopped = threading.Event()
        self._store = self._join_store(address)
        self._answered = self._moved = time.monotonic()
        self._position, self.stall = ("", 0), ""
        self._beats = [_Beat(self._answered) for _ in self._hosts]
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
                self._store.set(str(self._rank), f"{number} {_position_of_main_thread()}")
                verdict = self._store.get(_VERDICT).decode() if self._store.check([_VERDICT]) else ""
                if self._rank == 0:
                    self._check_ranks()
            except Exception:  # a broken connection is silence, which _watch_rank_0 judges by how long it lasts
                continue
            self._answered = time.monotonic()
            if verdict:
                self._report(verdict)

    def _check_ranks(self) -> None:
        """On rank 0: find ranks whose last heartbeat is too old."""
        self._receive_beats()
        now = time.monotonic()
        silent = [rank for rank, beat in enumerate(self._beats) if now - beat.received > self._silence_s]
        if silent:
            verdict = self._describe_silence(silent)
            self._store.set(_VERDICT, verdict)
            time.sleep(2 * self._interval_s)  # the others read it before the store ends with this process
            self._report(verdict)
        self._check_for_stall()

    def _receive_beats(self) -> None:
        now, ranks = time.monotonic(), [rank for rank in range(len(self._beats)) if self._store.check([str(rank)])]
        for rank, value in zip(ranks, self._store.multi_get([str(rank) for rank in ranks]), strict=True):
            number, _, position = value.decode().partition(" ")
            if number != self._beats[rank].number:
                self._beats[rank] = _Beat(now, number, position)

    def _check_for_stall(self) -> None:
        # The position alone is not enough: each look at a healthy training may find it at the line that waits for the
        # GPU.
        now, position = time.monotonic(), (_position_of_main_thread(), dist.num_sums())
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
        ranks_at: dict[str, list[int]] = {}
        for rank, beat in enumerate(self._beats):
            ranks_at.setdefault(beat.position, []).append(rank)
        rarest_first = sorted(ranks_at.items(), key=lambda item: len(item[1]))
        return f"no progress for {self._silence_s:g} s: " + "; ".join(
            f"rank {self._with_hosts(ranks)} in {position}" for position, ranks in rarest_first)

    def _with_hosts(self, ranks: list[int]) -> str:
        names = [f"{rank} ({self._hosts[rank]})" for rank in ranks[:_MOST_NAMED]]
        return ", ".join(names + ["..."] * (len(ranks) > _MOST_NAMED))

    def _report(self, text: str) -> None:
        if not self._stopped.is_set():
            self._on_silence(text)


def _position_of_main_thread() -> str:
    """Its function, file and line."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    return f"{frame.f_code.co_name} ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})"
