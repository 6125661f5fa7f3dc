"""Sparse training under ZeRO against the plain thing (plain.py, which says how near is near enough).

Each case localises one kind of bug: a stage's partitioning, a world size whose parts are padded or uneven (3), clipping
over the kept weights only, decay on the kept weights, losses that must not depend on how examples fall on ranks.
"""

import functools

import pytest
import torch

from sparse_train.config import LossConfig, TrainConfig, ZeroConfig
from sparse_train.models import family_of
from sparse_train.sparse import BitmaskTensor, sparsify
from sparse_train.tasks import Batch
from sparse_train.training import Hooks, TrainingRun, gathered_tensors, train
from sparse_train.training.order import Order
from tests.models import tiny_mpt
from tests.ranks import run_ranks
from tests.training.plain import Lines, assert_trained_as_exact, train_plain

_LOSS = LossConfig(task_weight=1.0, logit_weight=0.5, feature_weight=1.0, temperature=2.0)
_NUM_EXAMPLES, _VOCABULARY = 12, 50


def _config(stage, clip=0.5, accumulation=1, precision="fp32", offload=False):
    return TrainConfig(steps=10, batch_size=8, accumulation=accumulation, learning_rate=2e-3, warmup_steps=3,
                       weight_decay=0.1, clip=clip, precision=precision,
                       zero=ZeroConfig(stage=stage, persistence_threshold=0, offload_optimizer=offload))


_SPLITS = [(accumulation, clip) for accumulation in (1, 4) for clip in (0.5, 0.0)]
_CASES = [(stage, accumulation, clip, precision, False)
          for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16") for accumulation, clip in _SPLITS]
_CASES += [(stage, 4, 0.5, precision, True) for stage in (1, 2, 3) for precision in ("fp32", "bf16")]
# ranks -> the cases that they train in make test. The slow ring has the rest, whose parts stand here in other cases: no
# clipping and no accumulation at once, other splits on three ranks, whose parts are padded and uneven, and one rank.
_BRIEF = {1: [], 2: [case for case in _CASES if case[1:3] != (1, 0.0)],
          3: [case for case in _CASES if case[1:3] == (4, 0.5) and not case[4]]}


def _groups():
    """(ranks, cases that they train in one go, mark)."""
    for world, brief in _BRIEF.items():
        yield world, tuple(brief), ()
        yield world, tuple(case for case in _CASES if case not in brief), pytest.mark.slow


def _models():
    torch.manual_seed(0)
    student, teacher = tiny_mpt(), tiny_mpt()
    return sparsify(student, {
        name: BitmaskTensor.from_dense(linear.weight.detach(), torch.rand_like(linear.weight) < 0.25)
        for name, linear in family_of(student).prunable_linears(student).items()}), teacher


@functools.cache
def _examples():
    """Of very different lengths and numbers of targets; one has no target at all."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for index in range(_NUM_EXAMPLES):
        ids = torch.randint(_VOCABULARY, (3 + 2 * index,), generator=generator)
        found.append((ids, len(ids) if index == 5 else 1 + index))
    return found


def _fetch(indices):
    rows = [_examples()[i] for i in indices] or [(torch.zeros(1, dtype=torch.long), 1)]
    longest = max(len(ids) for ids, _ in rows)
    input_ids = torch.zeros(len(rows), longest, dtype=torch.long)
    attend, labels = torch.zeros_like(input_ids, dtype=torch.bool), torch.full_like(input_ids, -100)
    for row, (ids, prompt) in enumerate(rows if indices else ()):
        input_ids[row, :len(ids)], attend[row, :len(ids)] = ids, True
        labels[row, prompt:len(ids)] = ids[prompt:]
    return Batch(input_ids, attend, labels)


def _training_run(config, models=None):
    """A training of the tiny model on `_fetch`'s examples."""
    student, teacher = models or _models()
    order = Order(_NUM_EXAMPLES, config.batch_size, config.accumulation, 0, config.sequence_parallel)
    return TrainingRun(student, _fetch, order, config, loss=_LOSS, teacher=teacher)


def _train_ranks(cases, folder):
    """One process group trains all of `cases`: case -> (losses and norms, tensors)."""
    found = {}
    for case in cases:
        stage, accumulation, clip, precision, offload = case
        config, lines = _config(stage, clip, accumulation, precision, offload), Lines()
        outcome = train(_training_run(config), folder / "-".join(map(str, case)), Hooks(lines))
        found[case] = lines.found, {name: tensor.float() for name, tensor in gathered_tensors(outcome.engine)}
    return found


@functools.cache
def _reference(accumulation, clip, dtype):
    config = _config(0, clip, accumulation)
    return train_plain(_training_run(config), dtype)


@functools.cache
def _ranks(world, cases, folder, accelerator="cpu"):
    return run_ranks(_train_ranks, world, cases, folder, timeout_s=400, accelerator=accelerator)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parity")


def _name(case):
    return "stage{}-accumulate{}-clip{}-{}{}".format(*case[:4], "-offload" if case[4] else "")


@pytest.mark.parametrize("world, cases, case", [
    pytest.param(world, cases, case, marks=mark, id=f"{_name(case)}-{world}")
    for world, cases, mark in _groups() for case in cases])
def test_every_way_to_train_is_the_plain_masked_dense_training(world, cases, case, folder):
    _compare(case, [found[case] for found in _ranks(world, cases, folder / str(world))])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none")
@pytest.mark.parametrize("case", _CASES, ids=_name)
def test_one_gpu_trains_like_the_plain_masked_dense_training(case, folder):
    _compare(case, [found[case] for found in _ranks(1, tuple(_CASES), folder / "gpu", "cuda")])


def _compare(case, ranks):
    _, accumulation, clip, precision, _ = case
    lines, tensors = ranks[0]
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    assert_trained_as_exact(lines, tensors, _reference(accumulation, clip, dtype),
                            _reference(accumulation, clip, torch.float64))
    for _, other in ranks[1:]:
        for name, tensor in other.items():
            assert torch.equal(tensor, tensors[name]), name
