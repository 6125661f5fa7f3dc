"""Which process works on a run, and that folders are refused in which its logs would not be found."""

import os
import platform
import signal
import subprocess
import sys

import pytest

from sparse_train import stopping
from sparse_train.errors import UserError
from sparse_train.launch.cli import main
from sparse_train.launch.run import lock
from sparse_train.launch.run.lock import find_launcher, locked
from sparse_train.launch.worker import attempts, entry
from sparse_train.launch.worker.endings import newest_ending


def test_the_launcher_is_known_by_its_pid_and_start(tmp_path):
    assert find_launcher(tmp_path) is None
    with locked(tmp_path):
        assert find_launcher(tmp_path).pid == os.getpid()
    assert find_launcher(tmp_path) is None, "a sweep's launcher continues with another run"


@pytest.mark.parametrize("noted", ["HOST 1 STARTED", "HOST PID 1", "elsewhere PID STARTED", "HOST PID", "", "\0"])
def test_another_process_is_not_taken_for_the_launcher(noted, tmp_path):
    started = lock._start_time(os.getpid())
    for word, value in (("HOST", platform.node()), ("PID", str(os.getpid())), ("STARTED", started)):
        noted = noted.replace(word, value)
    (tmp_path / ".lock").write_text(noted)
    assert find_launcher(tmp_path) is None


def test_a_launcher_on_another_machine_is_not_shown_as_nothing(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("prune: {sparsity: 0.5}", encoding="utf-8")
    (tmp_path / ".lock").write_text("login2 1 1")
    assert main(["cancel", str(tmp_path)]) == 2
    assert "was started on login2 and has not ended" in capsys.readouterr().err


def test_a_process_that_nobody_has_waited_for_is_no_launcher():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    launcher = lock.Launcher(process.pid, lock._start_time(process.pid))
    assert launcher.is_alive
    process.stdin.close()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not launcher.is_alive
    process.wait()


@pytest.mark.parametrize("name", ["%j", "100%t", "a%A", "%a"])
def test_a_folder_that_submitit_would_rename_is_refused_before_it_is_made(name, tmp_path):
    with pytest.raises(UserError, match="give a folder without them"), locked(tmp_path / name):
        pass
    assert not list(tmp_path.iterdir())


@pytest.fixture
def handlers():
    # The default, whatever these tests were started with: nohup has SIGHUP ignored.
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_the_first_of_several_signals_ends_a_run(handlers):
    stopping.handle_signals()
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGHUP)
    for number in (signal.SIGHUP, signal.SIGTERM):  # the shell's, then the kernel's, then a batch system's
        signal.raise_signal(number)


def test_nohup_keeps_a_run_from_ending_with_its_terminal(handlers):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stopping.handle_signals()
    signal.raise_signal(signal.SIGHUP)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)


def test_a_rank_that_dies_in_its_imports_says_so(handlers, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sparse_train.launch.worker.process", None)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    for key, value in {"JOB_ID": 7, "NTASKS": 2, "JOB_NUM_NODES": 1, "NODEID": 0, "GLOBALID": 0, "LOCALID": 0}.items():
        monkeypatch.setenv(f"SUBMITIT_LOCAL_{key}", str(value))
    usr2 = signal.getsignal(signal.SIGUSR2)
    try:
        with pytest.raises(ImportError):
            entry.process(str(tmp_path), "dense")
    finally:
        signal.signal(signal.SIGUSR2, usr2)
    logs = tmp_path / "logs" / "dense"
    ending = newest_ending(logs, attempts.read_attempts(logs))  # as status looks for it
    assert (ending.status, ending.rank) == ("broken", 0)
    assert ending.message.startswith("could not be started: ModuleNotFoundError: import of sparse_train.launch.worker")
