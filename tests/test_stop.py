"""The flag that signals and the deadline set. The trainings that obey it are in training/test_resume."""

import os
import signal
import time

import pytest

from sparse_train.stopping import StopMonitor


class _Left(Exception):
    pass


@pytest.fixture
def leave(monkeypatch):
    def note(code):
        raise _Left(code)

    monkeypatch.setattr(os, "_exit", note)


@pytest.mark.parametrize("first, second, code", [
    ("SIGTERM", "SIGTERM", 143), ("SIGUSR2", "SIGTERM", 143),
    ("SIGTERM", "SIGUSR2", None),  # a preemption, and the warning that it makes due
    ("SIGUSR2", "SIGUSR2", None),
])
def test_a_second_signal_leaves_at_once_unless_it_is_a_warning(first, second, code, leave, monkeypatch):
    with StopMonitor(None) as monitor:
        assert not monitor.end_step()
        signal.raise_signal(signal.Signals[first])
        signal.raise_signal(signal.Signals[second])  # the same event
        assert monitor.end_step()
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 3)
        if code:
            with pytest.raises(_Left, match=str(code)):
                signal.raise_signal(signal.Signals[second])
        else:
            signal.raise_signal(signal.Signals[second])


def test_the_deadline_leaves_time_for_a_step_and_a_save_as_long_as_the_last(monkeypatch):
    now = [1000.0]
    for clock in ("monotonic", "time"):
        monkeypatch.setattr(time, clock, lambda: now[0])
    with StopMonitor(1400.0) as monitor:
        assert not monitor.end_step()
        with monitor.saving():
            now[0] += 100
        now[0] += 20
        assert not monitor.end_step()  # 120 + 1.5 * (20 + 100) = 300 of 400
        now[0] += 100
        assert monitor.end_step()  # 220 + 1.5 * (100 + 100) = 520


def test_a_save_within_a_step_is_no_part_of_it(monkeypatch):
    """As in a pruning, which saves a block before it asks; what comes before the first is no part of it either."""
    now = [1000.0]
    for clock in ("monotonic", "time"):
        monkeypatch.setattr(time, clock, lambda: now[0])
    for seconds, stops in ((50, False), (150, True)):
        now[0] = 1000.0
        with StopMonitor(1600.0) as monitor:
            now[0] += 300
            monitor.begin_step()
            now[0] += seconds
            with monitor.saving():
                now[0] += 10
            assert monitor.end_step() == stops  # 360 + 1.5 * (50 + 10) = 450, 460 + 1.5 * (150 + 10) = 700 of 600
