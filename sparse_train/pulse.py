"""Ranks that fall silent are noticed; without this the others would wait for them in a collective, perhaps for ever.

Each rank beats on a small store on rank 0, from a thread of its own. Rank 0 names the ranks that stopped beating; the
others notice when rank 0 no longer answers. Whoever finds out ends its own process: its main thread may be stuck.
A main thread that hangs while its rank goes on beating ends in a time-out of the others' collective; to tell them apart
then, beats carry what the main thread is in.
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
    """Beats from construction until stop(). `on_silence(text)` is called from a thread and should not return."""

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
        self._answered = time.monotonic()
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

    def whereabouts(self) -> str:
        """What the ranks' main threads were in when they beat last, the rarest place first. Empty where rank 0 does not
        answer, and on ranks above 1: a thousand questions at once would be too much for rank 0."""
        found: dict[str, list[str]] = {}
        try:
            for rank, host in enumerate(self._hosts if self._rank <= 1 else ()):
                if self._store.check([name := f"at {rank}"]):
                    found.setdefault(self._store.get(name).decode(), []).append(f"{rank} ({host})")
        except Exception:  # its connection is broken
            return ""
        return "; ".join(f"rank {_shortened(ranks)} in {where}"
                         for where, ranks in sorted(found.items(), key=lambda item: len(item[1])))

    def _beat(self) -> None:
        """Blocks where the network is cut; _watch sees it by the time of the last answer."""
        number = 0
        while not self._stopped.wait(self._pause_s):
            number += 1
            try:
                self._store.set(f"at {self._rank}", _place_of_main_thread())
                self._store.set(str(self._rank), str(number))
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

    def _watch(self) -> None:
        while not self._stopped.wait(self._pause_s):
            if self._rank and time.monotonic() - self._answered > self._silence_s:
                self._report(self._told([0]))

    def _told(self, silent: list[int]) -> str:
        return (f"rank {_shortened([f'{rank} ({self._hosts[rank]})' for rank in silent])} went silent for "
                f"{self._silence_s:g} s")

    def _report(self, text: str) -> None:
        if not self._stopped.is_set():
            self._on_silence(text)


def _shortened(ranks: list[str]) -> str:
    return ", ".join(ranks[:8]) + (", ..." if ranks[8:] else "")


def _place_of_main_thread() -> str:
    frame = sys._current_frames()[threading.main_thread().ident]
    return f"{frame.f_code.co_name} ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})"
