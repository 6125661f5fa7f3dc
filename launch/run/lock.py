"""The lock of a run folder: one launcher at a time, and which process it is.

    RUN/.lock     while a launcher works in it: its host, its pid, and when that process started
"""

import contextlib
import fcntl
import os
import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sparse_train.errors import UserError
from sparse_train.launch.run.folder import read_run

_FILE = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of the run folder, which is created where it is missing.

    Raises UserError where another launcher has it, and where the folder cannot be a run's.
    """
    if re.search("%[jtAa]", str(folder.absolute())):  # submitit replaces these in paths of logs
        raise UserError(f"{folder.absolute()}: %j, %t, %A and %a stand for a job's numbers in paths of logs; give a "
                        "folder without them (folder=...)")
    require_own_run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / _FILE, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder} is in use by another sparse-train; wait for it, or give name=OTHER") from error
        except OSError as error:
            raise UserError(f"{folder} is on storage without file locks ({error.strerror}); mount it with them, as "
                            "Lustre with -o flock, or give folder=ELSEWHERE") from error
        file.truncate(0)
        file.write(f"{platform.node()} {os.getpid()} {_start_time(os.getpid())}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)  # the launcher of a sweep continues with another run


def require_own_run(folder: Path) -> None:
    """Raises UserError unless the folder can be written, and is new, empty, a run's, or a copy of a run's."""
    above = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not above.is_dir():
        raise UserError(f"{above} is not a folder, so no run can be in it; give folder=ELSEWHERE")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{above} cannot be written (its permissions, or a read-only file system); give "
                        "folder=ELSEWHERE")
    if not folder.is_dir() or (folder / _FILE).is_file() or not any(folder.iterdir()):
        return
    try:
        read_run(folder)
    except UserError as error:
        raise UserError(f"{folder} holds files and is not a run folder; give another name or folder") from error


@dataclass(frozen=True)
class Launcher:
    """The process of this machine that runs a run's stages."""

    pid: int
    started: str

    @property
    def is_alive(self) -> bool:
        return _start_time(self.pid) == self.started


def find_launcher(run: Path) -> Launcher | None:
    """The launcher that works in the run folder; None where there is none on this machine."""
    host, launcher = _read_lock(run)
    return launcher if launcher and host == platform.node() and launcher.is_alive else None


def other_host(run: Path) -> str:
    """The other machine whose launcher has the lock, or had it when it was killed; "" where there is none."""
    host, launcher = _read_lock(run)
    return host if launcher and host != platform.node() else ""


def _read_lock(run: Path) -> tuple[str, Launcher | None]:
    with contextlib.suppress(OSError, ValueError):
        host, pid, started = (run / _FILE).read_text(encoding="utf-8").split()
        return host, Launcher(int(pid), started)
    return "", None


def _start_time(pid: int) -> str | None:
    """In ticks since the machine booted; None where the process is not alive. It tells a process from a later one with
    the same pid."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in (b"Z", b"X") else rest[18].decode()
