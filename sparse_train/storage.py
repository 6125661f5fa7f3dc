"""Storage that is full or refuses, as one line that names the file system, what was tried and what to do."""

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from sparse_train.errors import told_of

_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


def told(error: BaseException, folder: Path) -> str | None:
    """None where `error` and its causes are about other things. `folder`: where the files are, if it does not say."""
    for cause in _causes(error):
        # Native writers of safetensors and others only quote the system's words.
        number = cause.errno if isinstance(cause, OSError) and cause.errno else next(
            (full for full in _FULL if os.strerror(full) in str(cause)), None)
        place = getattr(cause, "filename", None)
        if number in _FULL:
            return _full(number, Path(os.fsdecode(place or folder)).absolute())
        if isinstance(cause, OSError) and number in _REFUSED and place:
            return told_of(cause)
    return None


def fills(folder: Path) -> str:
    """Where `folder`'s file system has no room left, that; else ""."""
    try:
        return f"{_mount(folder)} is full" if shutil.disk_usage(folder).free < 2**16 else ""
    except OSError:
        return ""


def _full(number: int, path: Path) -> str:
    mount = _mount(path)
    what = f"your quota on {mount} is used up" if number == errno.EDQUOT else f"the file system {mount} is full"
    stat = os.statvfs(mount)
    left = "no more files" if not stat.f_favail and stat.f_files else f"{stat.f_bavail * stat.f_frsize / 1e6:,.1f} MB"
    return (f"{what} ({left} left): {path} cannot be written; make room there, or give folder=ELSEWHERE; the same "
            "command goes on from what is saved")


def _mount(path: Path) -> Path:
    return next(above for above in (path.absolute(), *path.absolute().parents) if os.path.ismount(above))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
