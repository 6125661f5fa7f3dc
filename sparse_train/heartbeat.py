"""Ranks that fall silent are noticed; without this the others would wait for them in a collective, perhaps for ever.

Each rank beats on a small store on rank 0, from a thread of its own. Rank 0 names the ranks that stopped beating; the
others notice when rank 0 no longer answers. Whoever finds out ends its own process: its main thread may be stuck.
A main thread that hangs while its rank goes on beating ends in a time-out of the others' collective, which cannot say
whose fault it is. So beats carry what main threads are in, and rank 0 prints them all when its own does not move on.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import TCPStore

from sparse_train import dist

_VERDICT = "silent"


class Pulse:
    """Beats from construction until stop(). `on_silence(text)` is called from a thread and should not return.

    `stall`: on rank 0, what it has printed of the ranks when its main thread stayed in one place for silence_s; empty
    when it has moved on.
    """

    def __init__(self, host: str, address: str, silence_s: float, on_silence: Callable[[str], None]):
        """`host`: this rank's, for messages; `address`: rank 0's. Collective."""
        self._rank, self._silence_s, self._on_silence = dist.rank(), silence_s, on_silence
        self._hosts = dist.gather_objects(host)
        self._pause_s = min(5.0, silence_s / 6)
        self._stopped = threading.Event()
        settings = {"wait_for_workers": False, "timeout": timedelta(seconds=silence_s)}
        own = TCPStore(address, 0, is_master=True, **settings) if self._rank == 0 else None
        port = dist.gather_objects(own and own.port)[0]
        self._store = own or TCPStore(address, port, is_master=False, **settings)
        self._answered = self._moved = time.monotonic()
        self._at, self.stall = ("", 0), ""
        self._beats = dict.fromkeys(map(str, range(len(self._hosts))), (b"", self._answered))
        for target in (self._beat, self._watch):
            threading.Thread(target=target, daemon=True).start()

    def stop(self) -> None:
        """Before the process group is closed, and when every rank is past its last collective."""
        self._stopped.set()

    def tell(self, what: str) -> None:
        self._store.set(what, "")

    def wait_for(self, what: str) -> None:
        """Until another rank tells it, however long that takes: unlike a collective's, this wait has no time-out of its
        own, and only silence ends it."""
        while not self._store.check([what]):
            time.sleep(min(1.0, self._pause_s))

    def _beat(self) -> None:
        """Blocks where the network is cut; _watch sees it by the time of the last answer."""
        number = 0
        while not self._stopped.wait(self._pause_s):
            number += 1
            try:
                self._store.set(str(self._rank), f"{number} {_place_of_main_thread()}")
                verdict = self._store.get(_VERDICT).decode() if self._store.check([_VERDICT]) else ""
                if self._rank == 0:
                    self._look()
            except Exception:  # a broken connection is silence; how long it lasts decides
                continue
            self._answered = time.monotonic()
            if verdict:
                self._report(verdict)

    def _look(self) -> None:
        """Rank 0: who has not beaten for too long?"""
        now, names = time.monotonic(), [name for name in self._beats if self._store.check([name])]
        for name, beat in zip(names, self._store.multi_get(names), strict=True):
            if beat != self._beats[name][0]:
                self._beats[name] = beat, now
        silent = [int(name) for name, (_, heard) in self._beats.items() if now - heard > self._silence_s]
        if silent:
            verdict = self._told(silent)
            self._store.set(_VERDICT, verdict)
            time.sleep(2 * self._pause_s)  # let the others hear of it before the store goes
            self._report(verdict)
        self._look_for_a_stall()

    def _look_for_a_stall(self) -> None:
        # The place alone would not do: a healthy training may be seen at the line that waits for the GPU each time.
        now, at = time.monotonic(), (_place_of_main_thread(), dist.num_sums())
        if at != self._at:
            self._at, self._moved, self.stall = at, now, ""
        elif not self.stall and now - self._moved > self._silence_s:
            ranks: dict[str, list[int]] = {}
            for rank, (beat, _) in self._beats.items():
                ranks.setdefault(beat.decode().partition(" ")[2], []).append(int(rank))
            rarest_first = sorted(ranks.items(), key=lambda item: len(item[1]))
            self.stall = f"no progress for {self._silence_s:g} s: " + "; ".join(
                f"rank {self._named(some)} in {place}" for place, some in rarest_first)
            print(self.stall, file=sys.stderr, flush=True)

    def _watch(self) -> None:
        while not self._stopped.wait(self._pause_s):
            if self._rank and time.monotonic() - self._answered > self._silence_s:
                self._report(self._told([0]))

    def _told(self, silent: list[int]) -> str:
        return f"rank {self._named(silent)} went silent for {self._silence_s:g} s"

    def _named(self, ranks: list[int]) -> str:
        return ", ".join(f"{rank} ({self._hosts[rank]})" for rank in ranks[:8]) + (", ..." if ranks[8:] else "")

    def _report(self, text: str) -> None:
        if not self._stopped.is_set():
            self._on_silence(text)


def _place_of_main_thread() -> str:
    frame = sys._current_frames()[threading.main_thread().ident]
    return f"{frame.f_code.co_name} ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})"
