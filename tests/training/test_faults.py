"""kill -9 at random points of one training, saves included: it still ends with the bits of an undisturbed one."""

import multiprocessing
import os
import random
import signal

import pytest
import torch

from sparse_train import dist
from sparse_train.config import TrainConfig, ZeroConfig
from sparse_train.launch.submit.processes import free_port
from sparse_train.training import Hooks, gathered_tensors, train
from tests.ranks import CONTEXT
from tests.training.test_parity import _training_run

_WORLD = 2
# Saves after every step: about half of the time is spent in one.
_CONFIG = TrainConfig(steps=150, batch_size=6, learning_rate=2e-3, warmup_steps=5, weight_decay=0.1, checkpoint_every=1,
                      zero=ZeroConfig(stage=3, persistence_threshold=0))


class _Tell:
    """Tells the parent where the training is."""

    def __init__(self, told):
        self._told = told

    def rewind(self, step):
        self._told.put(("start", step))

    def log(self, step, metrics):
        self._told.put(("step", step))


def _rank(rank, port, folder, told):
    torch.set_num_threads(1)
    dist.start(rank, _WORLD, rank, _WORLD, "127.0.0.1", port)
    outcome = train(_training_run(_CONFIG), folder, Hooks(_Tell(told) if rank == 0 else None))
    tensors = dict(gathered_tensors(outcome.engine))
    if rank == 0:
        torch.save(tensors, folder / "end.pt")
    dist.barrier()
    dist.stop()


def _attempt(folder, kill_after=None, victim=0):
    """Run until the end, or kill -9 `victim` that many seconds after the first step. Returns the start step."""
    told, port = CONTEXT.Queue(), free_port()
    ranks = [CONTEXT.Process(target=_rank, args=(rank, port, folder, told), daemon=True) for rank in range(_WORLD)]
    for process in ranks:
        process.start()
    try:
        what, start = told.get(timeout=60)
        assert what == "start"
        if kill_after is None:
            for process in ranks:
                process.join(120)
        else:
            told.get(timeout=60)
            multiprocessing.connection.wait([ranks[victim].sentinel], kill_after)
            if ranks[victim].is_alive():
                os.kill(ranks[victim].pid, signal.SIGKILL)
        return start
    finally:
        for process in ranks:
            process.kill()
            process.join()


@pytest.mark.parametrize("num_kills", [6, pytest.param(30, marks=pytest.mark.slow)])
def test_kills_at_random_points_end_with_the_same_bits(num_kills, tmp_path):
    chance = random.Random(0)
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    assert _attempt(tmp_path / "whole") == 0
    starts = [_attempt(tmp_path / "cut", chance.uniform(0, 0.25), chance.randrange(_WORLD)) for _ in range(num_kills)]
    last = _attempt(tmp_path / "cut")
    assert starts == sorted(starts) and len(set(starts)) > num_kills / 2, starts  # every kill was inside the training
    assert 0 < last < _CONFIG.steps
    whole, cut = (torch.load(tmp_path / name / "end.pt") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    for name, tensor in whole.items():
        assert torch.equal(cut[name], tensor), name
