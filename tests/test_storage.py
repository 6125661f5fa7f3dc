"""A full disk is reported by the rank and by the launcher, also where the ending itself has no room."""

import contextlib
import errno
import subprocess

import pytest

from sparse_train import storage
from sparse_train.errors import UserError
from sparse_train.launch.worker.endings import read_ending, reserve_ending, write_ending
from sparse_train.launch.worker.failures import run_to_ending
from sparse_train.launch.worker.process_info import Attempt


@pytest.fixture
def small(tmp_path):
    """A file system of 1 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"needs to mount a tmpfs: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def _fill(folder):
    with open(folder / "checkpoint", "wb", buffering=0) as file:
        while file.write(bytes(2**16)):
            pass


def test_a_full_disk_is_reported_by_the_rank_and_by_the_launcher(small, caplog):
    reserve_ending(small, Attempt("7", 0), 0)
    ending = run_to_ending(lambda: _fill(small), 0, small)
    assert ending.status == "mistake"
    with pytest.raises(OSError):
        (small / "anything").write_bytes(bytes(2**16))
    write_ending(small, Attempt("7", 0), ending)
    told = read_ending(small, Attempt("7", 0), 1)
    assert told == ending and f"the file system {small} is full (0.0 MB left)" in told.message
    assert told.message in caplog.text
    # A rank that could not even begin leaves nothing; the launcher sees the disk.
    assert read_ending(small, Attempt("8", 0), 1).message == f"ended without a result; {small} is full"


def _raise(error):
    raise error


@pytest.mark.parametrize("error, told", [
    (OSError(errno.EDQUOT, "Disk quota exceeded", "/proc/x"), "your quota on /proc is used up"),
    (RuntimeError("I/O error: No space left on device (os error 28)"), "is full"),  # as safetensors says it
    (PermissionError(errno.EACCES, "Permission denied", "/a/b"), "/a/b: Permission denied; ask its owner"),
    (OSError(errno.EROFS, "Read-only file system", "/a/b"), "/a/b: Read-only file system"),
])
def test_what_storage_refuses_is_one_line(error, told, tmp_path):
    for raised in (error, ValueError("around it")):
        with contextlib.suppress(ValueError):
            raised.__cause__ = None if raised is error else error
        ending = run_to_ending(lambda raised=raised: _raise(raised), 0, tmp_path)
        assert ending.status == "mistake" and told in ending.message and "\n" not in ending.message


def test_other_errors_are_not_taken_for_it(tmp_path):
    for error in (ValueError("No such luck"), OSError(errno.EIO, "Input/output error"), PermissionError("no file")):
        assert storage.explain(error, tmp_path) is None


def test_the_log_may_be_on_the_full_disk_too(tmp_path, monkeypatch):
    class Full:
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

        flush = write

    monkeypatch.setattr("sys.stderr", Full())
    assert run_to_ending(lambda: _raise(UserError("a mistake")), 0).message == "a mistake"
