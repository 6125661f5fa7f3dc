"""A rank that falls silent is named by the others within the time-out; nobody waits for it."""

import os
import signal
import threading
import time

import pytest
import torch
from torch import distributed

from sparse_train.heartbeat import Heartbeat
from sparse_train.launch.submit.processes import free_port
from sparse_train.models import save_model
from tests.models import tiny_model
from tests.ranks import CONTEXT, run_ranks

_SILENCE_S = 3.0


def _rank(rank, world, silent, port, reports):
    from sparse_train import dist

    dist.start(rank, world, rank, world, "127.0.0.1", port)

    def end(silence):
        reports.put((rank, silence))
        time.sleep(0.5)
        os._exit(3)

    Heartbeat(f"host{rank}", "127.0.0.1", _SILENCE_S, end)
    dist.barrier()
    reports.put((rank, "up"))
    if rank == silent:
        reports.close()
        reports.join_thread()  # it has been sent
        os.kill(os.getpid(), signal.SIGSTOP)
    distributed.all_reduce(torch.zeros(1))  # waits for the silent one


@pytest.mark.parametrize("silent", [0, 1])
def test_a_silent_rank_is_named_and_the_others_end(silent):
    queue, port = CONTEXT.Queue(), free_port()
    ranks = [CONTEXT.Process(target=_rank, args=(rank, 3, silent, port, queue), daemon=True) for rank in range(3)]
    for process in ranks:
        process.start()
    try:
        first = [queue.get(timeout=60) for _ in range(3)]
        assert all(text == "up" for _, text in first)
        reports = dict(queue.get(timeout=5 * _SILENCE_S) for _ in range(2))
        assert set(reports) == {0, 1, 2} - {silent}
        assert set(reports.values()) == {f"rank {silent} (host{silent}) went silent for 3 s"}
        for rank, process in enumerate(ranks):
            if rank != silent:
                process.join(10)
                assert process.exitcode == 3
    finally:
        for process in ranks:
            process.kill()


def _quiet_end():
    from sparse_train import dist

    reports = []
    heartbeat = Heartbeat("host", "127.0.0.1", 1.0, reports.append)
    time.sleep(2.5)
    dist.barrier()
    heartbeat.stop()
    time.sleep(0.5)
    return reports


def _patient():
    from sparse_train import dist

    heartbeat = Heartbeat("host", "127.0.0.1", 1.0, lambda text: os._exit(3))
    started = time.monotonic()
    if dist.rank() == 0:
        time.sleep(3)
        heartbeat.announce("done")
    else:
        heartbeat.wait_for("done")
    dist.barrier()
    heartbeat.stop()
    return time.monotonic() - started


def test_a_wait_for_a_rank_that_lives_has_no_end_of_its_own():
    assert min(run_ranks(_patient, 2)) > 2.5


def _hang_in_the_data():
    time.sleep(3 * _SILENCE_S)


def _in_different_places():
    from sparse_train import dist

    heartbeat = Heartbeat(f"host{dist.rank()}", "127.0.0.1", _SILENCE_S, lambda text: os._exit(3))
    told = []
    # Healthy for longer than the silence: always at the same line, but with sums that go on.
    for _ in range(50):
        dist.any_rank(False), time.sleep(_SILENCE_S / 30)
        told.append(heartbeat.stall)
    threading.Timer(2.5 * _SILENCE_S, lambda: told.append(heartbeat.stall)).start()
    if dist.rank() == 1:
        _hang_in_the_data()
    distributed.all_reduce(torch.zeros(1))
    heartbeat.stop()
    return told


def test_a_main_thread_that_hangs_is_named_with_its_line():
    told = run_ranks(_in_different_places, 3)[0]
    assert told[:-1] == [""] * 50
    odd, others = told[-1].split("; ")
    assert odd.startswith("no progress for 3 s: rank 1 (host1) in _hang_in_the_data (test_heartbeat.py:")
    assert others.startswith("rank 0 (host0), 2 (host2) in all_reduce (distributed_c10d.py:")


def _hang_after_work():
    from sparse_train import dist

    reports = []
    heartbeat = Heartbeat(f"host{dist.rank()}", "127.0.0.1", _SILENCE_S, reports.append, watches_hangs=True)
    started = time.monotonic()
    while dist.rank() == 0 and time.monotonic() < started + 2.5 * _SILENCE_S: pass  # noqa: E701 - always in one line
    dist.barrier()
    while_one_worked = list(reports)
    if dist.rank() == 1:
        _hang_in_the_data()
    distributed.all_reduce(torch.zeros(1))
    heartbeat.stop()
    return while_one_worked, set(reports)


def test_a_rank_that_takes_no_cpu_time_ends_all_and_one_that_works_does_not():
    for while_one_worked, reports in run_ranks(_hang_after_work, 2):
        assert not while_one_worked
        (report,) = reports
        assert report.startswith("no CPU time for 3 s: rank 1 (host1) in _hang_in_the_data (test_heartbeat.py:")


def _hang_beside_a_sharded_model(path):
    from sparse_train import dist
    from sparse_train.training import load_sharded

    model, reports = load_sharded(path, "fp32"), []
    heartbeat = Heartbeat(f"host{dist.rank()}", "127.0.0.1", _SILENCE_S, reports.append, watches_hangs=True)
    if dist.rank() == 1:
        _hang_in_the_data()
    model(torch.tensor([[5, 6, 7]]))
    dist.barrier()
    heartbeat.stop()
    return set(reports)


def test_a_rank_that_waits_for_a_sharded_models_weights_does_not_count_as_hung(tmp_path):
    model, processor = tiny_model("llama")
    save_model(tmp_path, model, processor)
    for reports in run_ranks(_hang_beside_a_sharded_model, 2, tmp_path):
        (report,) = reports
        assert report.startswith("no CPU time for 3 s: rank 1 (host1) in _hang_in_the_data (test_heartbeat.py:")


def test_ranks_that_live_are_left_alone():
    assert run_ranks(_quiet_end, 2) == [[], []]
