"""Stopping, resuming and damage: what comes out is to the bit what an undisturbed training makes."""

import functools
import json
import os
import shutil
import signal
import time

import pytest
import torch
from safetensors import safe_open

from sparse_train import dist
from sparse_train.config import TrainConfig, ZeroConfig
from sparse_train.models import family_of
from sparse_train.sparse import sparse_linears
from sparse_train.training import Hooks, checkpoint, gathered_tensors, train
from sparse_train.training.order import Order
from tests.ranks import run_ranks
from tests.training.test_parity import _models, _training_run


def _config(stage=3, **extra):
    return TrainConfig(**{"steps": 8, "batch_size": 6, "learning_rate": 2e-3, "warmup_steps": 2, "weight_decay": 0.1,
                          "checkpoint_every": 2, "zero": ZeroConfig(stage=stage, persistence_threshold=0), **extra})


class _Log:
    """Keeps what is logged; raises SIGTERM in its own process when `stop_at` is logged."""

    def __init__(self, stop_at=None):
        self.steps, self.losses, self._stop_at = [], [], stop_at

    def rewind(self, step):
        self.start = step

    def log(self, step, metrics):
        self.steps.append(step)
        self.losses.append(metrics["loss"])
        if step == self._stop_at:
            os.kill(os.getpid(), signal.SIGTERM)


def _train(config, folder, stop_at=None, stop_rank=0, deadline=None):
    log = _Log(stop_at if dist.rank() == stop_rank else None)
    outcome = train(_training_run(config), folder, Hooks(log, deadline_s=deadline if dist.rank() == 0 else None))
    return outcome.finished, log.start, log.steps, dict(gathered_tensors(outcome.engine)), outcome.metrics


def _equal(mine, theirs):
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """config -> (folder of the checkpoints, what rank 0 found) of a training on two ranks that nothing interrupts."""
    @functools.cache
    def trained(config):
        folder = tmp_path_factory.mktemp("undisturbed")
        return folder, run_ranks(_train, 2, config, folder)[0]

    return trained


@pytest.mark.parametrize("stage, stop_rank", [(3, 0), (2, 1), (0, 0)])
def test_stopped_by_a_signal_and_resumed_is_uninterrupted_to_the_bit(stage, stop_rank, undisturbed, tmp_path):
    config = _config(stage)
    _, whole = undisturbed(config)
    assert whole[0] and whole[2] == list(range(1, 9))
    first = run_ranks(_train, 2, config, tmp_path / "cut", 4, stop_rank)[0]
    # The signal comes while step 4 is logged; the ranks agree on it in step 5.
    assert not first[0] and first[2] == [1, 2, 3, 4, 5]
    second = run_ranks(_train, 2, config, tmp_path / "cut")[0]
    assert second[0] and second[1] == 5 and second[2] == [6, 7, 8]
    assert _equal(second[3], whole[3])


def test_a_training_that_is_cut_off_after_its_last_step_repeats_none(undisturbed, tmp_path):
    _, whole = undisturbed(_config())
    first = run_ranks(_train, 2, _config(), tmp_path / "cut", 7)[0]
    assert not first[0] and first[2] == list(range(1, 9))
    second = run_ranks(_train, 2, _config(), tmp_path / "cut")[0]
    assert second[0] and second[1] == 8 and second[2] == []
    assert _equal(second[3], whole[3]) and second[4]["loss"] == whole[4]["loss"] and second[4] == first[4]


@pytest.mark.parametrize("spoil", ["truncate", "flip", "unsign", "remove"])
def test_a_damaged_checkpoint_is_left_out_and_the_one_before_it_taken(spoil, undisturbed, tmp_path):
    config = _config()
    folder, whole = undisturbed(config)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    newest = sorted(tmp_path.glob("step-*"))[-1]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000006", "step-00000008"]
    file = next(path for path in sorted(newest.rglob("*")) if path.suffix == ".safetensors")
    content = file.read_bytes()
    if spoil == "truncate":
        file.write_bytes(content[:-1])
    elif spoil == "flip":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif spoil == "unsign":
        (newest / "DONE").unlink()
    else:
        file.unlink()
    again = run_ranks(_train, 2, config, tmp_path)[0]
    assert again[1] == 6 and again[2] == [7, 8]
    assert _equal(again[3], whole[3])


def test_a_checkpoint_that_was_signed_and_not_renamed_does_not_count(undisturbed, tmp_path):
    config = _config(steps=4)
    folder, whole = undisturbed(config)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "step-00000004").rename(tmp_path / "step-00000004.partial")
    assert checkpoint.newest_step(tmp_path) == 2
    again = run_ranks(_train, 2, config, tmp_path)[0]
    assert again[1] == 2 and _equal(again[3], whole[3])


@pytest.mark.parametrize("precision, stages", [
    ("fp32", (3, 3, 3)), ("fp32", (2, 3, 0)), ("fp32", (0, 1, 3)), ("bf16", (3, 3, 3)), ("bf16", (0, 2, 3)),
], ids=str)
def test_a_training_goes_on_with_another_number_of_ranks_or_another_stage(precision, stages, undisturbed, tmp_path):
    _, whole = undisturbed(_config(stages[0], precision=precision))
    for world, stage, stop in ((2, stages[0], 2), (3, stages[1], 5), (1, stages[2], None)):
        found = run_ranks(_train, world, _config(stage, precision=precision), tmp_path / "cut", stop)[0]
    assert found[0] and found[2] == [7, 8]
    for name, tensor in whole[3].items():
        error = (found[3][name].float() - tensor.float()).abs().max()
        assert error <= (1e-6 if precision == "fp32" else 2e-2), f"{name}: {error}"


def _files_opened_to_go_on(config, folder):
    opened = set()

    def open_and_note(file, framework):
        opened.add(file.name)
        return safe_open(file, framework)

    checkpoint.safe_open = open_and_note
    _train(config, folder)
    return opened


def test_on_as_many_ranks_as_before_each_reads_its_own_file_alone(tmp_path):
    run_ranks(_train, 2, _config(), tmp_path, 4)
    files = ["rank-00000.safetensors", "rank-00001.safetensors"]
    assert run_ranks(_files_opened_to_go_on, 2, _config(), tmp_path) == [{file} for file in files]
    assert run_ranks(_files_opened_to_go_on, 1, _config(), tmp_path) == [set(files)]


def test_a_rank_without_a_part_of_a_parameter_opens_nothing(tmp_path):
    assert checkpoint._Reader(tmp_path, {"norm": 3}).read("master", "norm", 3, 3).numel() == 0


def test_with_a_deadline_the_first_step_is_saved_to_know_how_long_that_takes(tmp_path):
    config, deadline = _config(checkpoint_every=100), time.time() + 3600
    run_ranks(_train, 2, config, tmp_path, 3, 0, deadline)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000004"]
    assert 0 < checkpoint.save_seconds(tmp_path) < 60
    run_ranks(_train, 2, config, tmp_path, None, 0, deadline)  # it is known now: no step-00000005
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000008"]


class _TakenOver(Exception):
    pass


def _save_against_a_newer_process(folder):
    def require_newest_attempt():
        if (folder / "step-00000002").exists():
            (folder / "step-00000004.partial").mkdir()  # the other's save
            raise _TakenOver

    try:
        train(_training_run(_config()), folder, Hooks(require_newest_attempt=require_newest_attempt))
    except _TakenOver:
        return True


def test_a_process_that_was_taken_over_touches_no_checkpoint(tmp_path):
    assert run_ranks(_save_against_a_newer_process, 1, tmp_path)[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000004.partial"]


def _flip_a_bit_on_rank_1(when, stage, folder):
    student, teacher = _models()
    linear = next(iter(sparse_linears(student).values()))

    class Log(_Log):
        def log(self, step, metrics):
            if step == 4:  # before its save
                getattr(linear.bitmask, "ds_tensor", linear.bitmask).view(-1)[0] ^= 1

    if when == "start" and dist.rank() == 1:
        linear.bitmask[0, 0] ^= 1
    log = Log() if when == "save" and dist.rank() == 1 else None
    try:
        train(_training_run(_config(stage), (student, teacher)), folder, Hooks(log))
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize(("when", "stage"), [("start", 1), ("start", 3), ("save", 1), ("save", 3)])
def test_bits_that_differ_stop_every_rank_and_name_the_tensor_and_the_ranks(when, stage, tmp_path):
    told = run_ranks(_flip_a_bit_on_rank_1, 2, when, stage, tmp_path)
    assert told[0] == told[1] and "transformer.blocks.0.attn.Wqkv" in told[0] and "ranks [1]" in told[0], told
    saved = [path.name for path in tmp_path.iterdir()]
    assert saved == ([] if when == "start" else ["step-00000002"])


def test_a_checkpoint_of_other_bits_is_refused(tmp_path):
    run_ranks(_train, 1, _config(), tmp_path)
    manifest = json.loads((newest := sorted(tmp_path.glob("step-*"))[-1] / "manifest.json").read_text())
    manifest["bits"]["transformer.blocks.1.ffn.up_proj"] = "0" * 64
    newest.write_text(json.dumps(manifest))
    with pytest.raises(AssertionError, match=r"for another model: transformer.blocks.1.ffn.up_proj differs"):
        run_ranks(_train, 1, _config(), tmp_path)


def test_activation_checkpointing_changes_no_bit(undisturbed, tmp_path):
    _, plain = undisturbed(_config(steps=4))
    less = run_ranks(_train, 2, _config(steps=4, activation_checkpointing=True), tmp_path)[0]
    for name, tensor in plain[3].items():
        assert torch.equal(less[3][name], tensor), name


def _explode(folder, what):
    student, teacher = _models()
    block, calls = family_of(student).blocks(student)["transformer.blocks.1"], []

    def spoil(module, inputs, output):
        calls.append(1)
        if len(calls) == 4 and dist.rank() == 1:  # step 4: the checkpoint of step 2 is there
            hidden = output[0] if isinstance(output, tuple) else output
            if what == "output":
                hidden = hidden * float("inf")
            else:
                hidden.register_hook(lambda grad: grad * float("nan"))
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    block.register_forward_hook(spoil)
    try:
        train(_training_run(_config(), (student, teacher)), folder)
    except FloatingPointError as error:
        return str(error)


@pytest.mark.parametrize("what", ["output", "gradient"])
def test_a_number_that_is_not_finite_stops_all_ranks_in_its_step_and_names_the_block(what, tmp_path):
    told = run_ranks(_explode, 2, tmp_path, what)
    assert told[0] == told[1] and told[0].startswith("step 4: "), told
    assert f"first in the {what} of transformer.blocks.1, on ranks [1]" in told[0], told
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def _order(num_examples, steps, batch_size):
    order = Order(num_examples, batch_size, 1, seed=4)
    return [order.indices(step, 0) for step in range(steps)]


def test_every_example_is_seen_once_per_epoch_whatever_the_number_of_ranks():
    alone = _order(10, 10, 4)
    epochs = [index for step in alone for index in step]
    assert all(sorted(epochs[start:start + 10]) == list(range(10)) for start in range(0, 40, 10))
    assert epochs[:10] != epochs[10:20]
    ranks = run_ranks(_order, 3, 10, 10, 4)
    assert [[index for part in parts for index in part] for parts in zip(*ranks, strict=True)] == alone
    assert _order(None, 2, 3) == [[0, 1, 2], [3, 4, 5]]
