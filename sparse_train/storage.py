"""A disk that is full, or refuses access, reported in one line: the file system, the file and the remedy."""

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from sparse_train.errors import REMEDIES, describe_error

_FULL = (errno.ENOSPC, errno.EDQUOT)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


def explain(error: BaseException, folder: Path) -> str | None:
    """One line where `error` or one of its causes comes from storage, else None.

    `folder` holds the files, for errors that do not name theirs.
    """
    for cause in _causes(error):
        # Native writers of safetensors and others only quote the system's words.
        number = cause.errno if isinstance(cause, OSError) and cause.errno else next(
            (full for full in _FULL if os.strerror(full) in str(cause)), None)
        path = getattr(cause, "filename", None)
        if number in _FULL:
            return _explain_full(number, Path(os.fsdecode(path or folder)).absolute())
        if isinstance(cause, OSError) and number in _REFUSED and path:
            return describe_error(cause)
    return None


def describe_full(folder: Path) -> str:
    """That `folder`'s file system is full, where it is; else ""."""
    try:
        return f"{_mount(folder)} is full" if shutil.disk_usage(folder).free < 2**16 else ""
    except OSError:
        return ""


def _explain_full(number: int, path: Path) -> str:
    mount = _mount(path)
    what = f"your quota on {mount} is used up" if number == errno.EDQUOT else f"the file system {mount} is full"
    stat = os.statvfs(mount)
    free = "no more files" if not stat.f_favail and stat.f_files else f"{stat.f_bavail * stat.f_frsize / 1e6:,.1f} MB"
    return f"{what} ({free} left): {path} cannot be written; {REMEDIES[number]}"


def _mount(path: Path) -> Path:
    return next(above for above in (path.absolute(), *path.absolute().parents) if os.path.ismount(above))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
