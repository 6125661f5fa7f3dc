"""Pruning over ranks and block by block from files: the same bits as of a whole model on one, also after a stop."""

import logging
import os
import shutil
import time
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from sparse_train import artifacts, dist
from sparse_train.config import ModelConfig, PruneConfig, RunConfig
from sparse_train.errors import UserError
from sparse_train.jobs import prune as prune_job
from sparse_train.jobs.job import Input, Job, Stopped
from sparse_train.jobs.stage import Kind, Stage
from sparse_train.models import build_model, build_processor, load_model, load_processor, open_model, save_model
from sparse_train.pruning import blockwise, calibration_batches, prune, rows
from sparse_train.pruning.pattern import keep_largest
from sparse_train.pruning.rows import Piece, divide
from sparse_train.pruning.saved import PrunedBlocks
from sparse_train.sparse import densify, sparse_linears, sparsify
from sparse_train.tasks.batch import collate
from tests import pruning_memory
from tests.models import tiny_examples, tiny_model, tiny_tokenizer
from tests.ranks import run_ranks

SPECS = [("t5", {"pattern": "2:4", "method": "wanda"}), ("mpt", {"sparsity": 0.5, "method": "obert"}),
         ("mpt", {"sparsity": 0.7, "method": "admm", "options": {"iterations": 4, "ramp": 2}}),
         ("llama", {"sparsity": 0.6}),
         ("opt", {"sparsity": 0.5, "method": "magnitude"}),
         ("opt", {"sparsity": 0.6, "method": "alps", "options": {"iterations": 8}}),
         ("llama", {"pattern": "4:8", "method": "admm"})]


def _prune_all(specs):
    """[{name: (values, bitmask)} of each], and the models' weights are those. Linears of more than 8 rows are large."""
    with one_thread(), patch.object(rows, "PANEL", 8):
        return [_pruned(family, PruneConfig(**spec)) for family, spec in specs]


@contextmanager
def one_thread():
    """Products may add in another order on more."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _pruned(family, spec):
    model, processor = tiny_model(family)
    examples = tiny_examples(processor)
    batches = [collate(examples[index:index + 1], processor) for index in range(len(examples))]
    weights = prune(model, batches[dist.rank()::dist.world_size()], spec)
    for name, weight in weights.items():
        assert torch.equal(model.get_submodule(name).weight, weight.to_dense()), name
    return {name: (weight.values, weight.bitmask) for name, weight in weights.items()}


@pytest.mark.parametrize("world, specs", [(3, SPECS[:3]), *(
    pytest.param(world, SPECS, marks=pytest.mark.slow) for world in (2, 3, 5))])
def test_the_number_of_ranks_changes_no_bit(world, specs):
    """Of four batches, three ranks have two, one and one; the last of five has none."""
    alone = _prune_all(specs)
    for rank, found in enumerate(run_ranks(_prune_all, world, specs)):
        for (family, _), mine, expected in zip(specs, found, alone, strict=True):
            assert list(mine) == list(expected)
            for name, tensors in expected.items():
                assert all(map(torch.equal, mine[name], tensors)), (rank, family, name)


def _job(folder, source, out, **prune):
    """`source`: the name of a model's folder in `folder`, which is pruned into another one there, `out`."""
    dense = Stage(Kind.DENSE, "dense", external=str(folder / source))
    return Job(RunConfig(prune={"num_calibration": 6, "batch_size": 2, **prune}),
               Stage(Kind.PRUNE, "prune", inputs=(dense,)), folder / out, (Input(dense, folder / source),),
               _ignore)


def _ignore(*_):
    """As a job's progress; ranks get a job pickled."""


def write_dense(folder, family, **size):
    torch.manual_seed(0)
    config = ModelConfig(**{"family": family, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128, **size})
    processor = build_processor(config, tiny_tokenizer())
    save_model(folder / "dense", build_model(config, processor), processor)


def _prune_whole(job):
    """The same with a model that is held, into the folder "whole"."""
    path, (level,) = job.inputs[0].path, job.config.prune.levels
    model, processor = load_model(path), load_processor(path)
    earlier = {name: linear.weight.keep for name, linear in sparse_linears(model).items()}
    weights = prune(densify(model), calibration_batches(level, job.config.task, processor), level, earlier=earlier)
    save_model(job.out.with_name("whole"), sparsify(model, weights), processor)
    return weights


@pytest.mark.parametrize("family, keys", [
    ("mpt", {"sparsity": 0.6, "reconstruction": {"steps": 3}}), ("t5", {"pattern": "2:4"}),
    ("llama", {"sparsity": 0.7, "method": "magnitude"}), ("llama", {"sparsity": 0.6, "method": "obert"}),
    ("gpt_neox", {"sparsity": 0.6, "allocation": "owl", "ignore": ("*.1.*",)})])
def test_a_model_that_is_read_block_by_block_gives_the_files_of_a_whole_one(family, keys, tmp_path):
    """At two levels: the second one reads a sparse model."""
    write_dense(tmp_path, family, n_layers=3)
    for source, level in (("dense", "first"), ("first", "second")):
        keys = keys if level == "first" or "pattern" in keys else keys | {"sparsity": 0.8}
        job = _job(tmp_path, source, level, **keys)
        metrics = prune_job.run(job)
        weights = _prune_whole(job)
        assert metrics["layers"] == {name: weight.sparsity for name, weight in weights.items()}
        assert metrics["num_prunable"] == sum(rows * columns for rows, columns in (w.shape for w in weights.values()))
        files = {name: (tmp_path / name / "sparse.safetensors").read_bytes() for name in (level, "whole")}
        assert files[level] == files["whole"]


def _run(num_saved, *place, method="sparsegpt", **changes):
    """_job(*place) with `changes`; the process dies when it is to save one block more than `num_saved`."""
    def count():
        nonlocal num_saved
        if num_saved == 0:
            os._exit(1)
        num_saved = num_saved and num_saved - 1

    with one_thread():
        return prune_job.run(replace(_job(*place, method=method, sparsity=0.6, allocation="owl"),
                                     require_newest_attempt=count, **changes))


def _take_time_to_record(seconds, monkeypatch):
    def record(*arguments):
        nonlocal passed
        passed += seconds
        return record_calls(*arguments)

    passed, monotonic, record_calls = 0, time.monotonic, blockwise.record_calls
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + passed)
    monkeypatch.setattr(blockwise, "record_calls", record)


def test_a_pruning_that_is_interrupted_ends_with_the_same_bits(tmp_path, caplog, monkeypatch):
    """Killed in the encoder, stopped behind it; then its last block is damaged and half of another lies there."""
    write_dense(tmp_path, "t5")
    whole, place = (tmp_path, "dense", "whole"), (tmp_path, "dense", "out")
    with monkeypatch.context() as patched:
        _take_time_to_record(1000, patched)
        _run(None, *whole, deadline_s=time.time() + 500)  # blocks do not take as long
    with pytest.raises(AssertionError, match=r"ranks \[0|Connection"):
        run_ranks(_run, 3, 1, *place)
    saved = tmp_path / "out" / "checkpoints"
    assert sorted(path.name for path in saved.iterdir()) == ["sparsities.json", "step-00000001"]
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.delattr(blockwise, "outlier_share")  # OWL has looked at the model
        _run(None, *place, deadline_s=time.time())
    damaged = saved / "step-00000002" / "sparse.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    shutil.copytree(saved / "step-00000001", saved / "step-00000003.partial")
    with caplog.at_level(logging.WARNING):
        blocks = PrunedBlocks(saved, open_model(tmp_path / "dense")[1])
    assert blocks.num_done == 1
    assert "pruned again from block 2 on" in caplog.text and "is not the file that was signed" in caplog.text
    (saved / "step-00000002.partial").mkdir()  # of an attempt that goes on elsewhere
    with monkeypatch.context() as patched, pytest.raises(UserError, match="is not signed"):
        patched.setattr(artifacts, "publish", _ignore)  # as on a node that does not see it yet
        blocks.save({}, _ignore)
    assert len(run_ranks(_run, 2, None, *place)[0]["peak_memory_gb"]) == 2
    found, expected = ((tmp_path / out / "sparse.safetensors").read_bytes() for out in ("out", "whole"))
    assert found == expected


def test_a_pruning_from_the_last_block_on_is_stopped_and_ends_with_the_same_bits(tmp_path):
    """The gradients of the blocks that are left are those of a model of which nothing is pruned yet."""
    write_dense(tmp_path, "llama", n_layers=3)
    _run(None, tmp_path, "dense", "whole", method="obert")
    for num_done in (1, 2):
        with pytest.raises(Stopped):
            _run(None, tmp_path, "dense", "out", method="obert", deadline_s=time.time())
        blocks = PrunedBlocks(tmp_path / "out" / "checkpoints", open_model(tmp_path / "dense")[1])
        assert blocks.num_done == num_done
        assert {name.split(".")[2] for name in blocks.counts()} == {str(2 - index) for index in range(num_done)}
    _run(None, tmp_path, "dense", "out", method="obert")
    found, expected = ((tmp_path / out / "sparse.safetensors").read_bytes() for out in ("out", "whole"))
    assert found == expected


def _trained(steps, *sizes):
    """Values by linear, of a model for each of `sizes`, the number of examples of a batch."""
    found = []
    for size in sizes:
        model, processor = tiny_model("llama")
        examples = tiny_examples(processor)
        batches = [collate(examples[start:start + size], processor) for start in range(0, len(examples), size)]
        weights = prune(model, batches[dist.rank()::dist.world_size()], PruneConfig(
            method="magnitude", sparsity=0.6, reconstruction={"steps": steps, "learning_rate": 1e-3}))
        found.append({name: weight.values for name, weight in weights.items()})
    return found


def test_a_step_of_reconstruction_takes_a_batch_of_each_rank():
    """Two ranks with an example each are one with both; in the other case the second rank has no batch at all."""
    start, expected = _trained(0, 2, 4), _trained(6, 2, 4)
    for found in run_ranks(_trained, 2, 6, 1, 4):
        for mine, alone, before in zip(found, expected, start, strict=True):
            for name, values in alone.items():
                assert (mine[name] - values).norm() < 0.01 * (values - before[name]).norm(), name


def _peak_memory(folder):
    with one_thread():
        return prune_job.run(_job(folder, "dense", "out", sparsity=0.75))["peak_memory_gb"]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_blocks(tmp_path):
    """Blocks of 10 MB, all of which are 231 MB more. The allocator keeps some of what is freed."""
    peaks = {}
    for num_blocks in (2, 24):
        folder = tmp_path / str(num_blocks)
        write_dense(folder, "llama", d_model=512, d_ff=1024, n_layers=num_blocks)
        peaks[num_blocks] = run_ranks(_peak_memory, 2, folder, timeout_s=600)[0]
    print(peaks)
    assert (tmp_path / "24" / "dense" / "model.safetensors").stat().st_size > 250e6
    for few, many in zip(*peaks.values(), strict=True):
        assert many - few < 0.06  # GB


@pytest.mark.slow
def test_a_rank_needs_one_block_and_its_hessians(tmp_path):
    """Libraries have buffers of their own."""
    pruning_memory.write_model(tmp_path / "dense", 1024, 1)
    peaks = run_ranks(pruning_memory.peak, 2, tmp_path, timeout_s=900)
    expected = sum(pruning_memory.expected_bytes(1024, pruning_memory.NUM_TOKENS // 2).values())
    print(peaks, expected)
    assert 0.9 * expected < max(peaks) < 1.1 * expected + 5e7


def _message(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    return str(caught.value)


def _fail():
    """What is said of a Hessian that is singular, and of a token of the second batch alone that is not finite."""
    model, processor = tiny_model("llama")
    batches = [collate([example], processor) for example in tiny_examples(processor)]
    mine, *others = (set(batches[index].input_ids.flatten().tolist()) for index in (1, 0, 2, 3))
    model.get_input_embeddings().weight.data[min(mine.difference(*others))] = torch.nan
    return [_message(_pruned, "mpt", PruneConfig(method="sparsegpt", sparsity=0.6, damping=1e-30)),
            _message(prune, model, batches[dist.rank()::dist.world_size()], PruneConfig(sparsity=0.6))]


def test_what_one_rank_meets_is_said_by_all():
    messages = run_ranks(_fail, 2)
    assert messages[0] == messages[1] and "its Hessian is singular" in messages[0][0]
    assert "is not finite in example 1 of calibration batch 2;" in messages[0][1]


def test_linears_are_divided_by_their_cost():
    shapes = {"small": (8, 8), "down": (8, 32), "up": (32, 8), "query": (8, 8), "key": (8, 8)}
    rank_of = {piece.name: piece.rank for piece in divide(shapes, 2, divides_rows=False)}
    assert rank_of["down"] == 0 and {rank for name, rank in rank_of.items() if name != "down"} == {1}
    assert {piece.rank for piece in divide(shapes, 1, divides_rows=True)} == {0}
    assert [piece.rank for piece in divide(shapes, 8, divides_rows=False)] == [0, 1, 2, 3, 4]


def test_a_linear_of_more_than_a_ranks_share_is_divided_into_whole_panels():
    """And before the others: of 256 rows, one panel, the costliest linear is divided on no number of ranks."""
    shapes = {"small": (64, 64), "up": (1000, 256), "down": (256, 1000)}
    assert divide(shapes, 3, divides_rows=True) == [
        Piece("down", 0, 256, 0), Piece("up", 0, 1000, 1), Piece("small", 0, 64, 2)]
    shapes["down"] = (700, 1000)
    assert divide(shapes, 2, divides_rows=True)[:2] == [Piece("down", 0, 256, 0), Piece("down", 256, 700, 1)]
    pieces = divide({"down": (700, 1000)}, 5, divides_rows=True)
    assert [(piece.start, piece.stop) for piece in pieces] == [(0, 0), (0, 256), (256, 256), (256, 512), (512, 700)]
    pieces = divide({"down": (256, 1024), "up": (1024, 256)}, 64, divides_rows=True)
    assert [piece.name for piece in pieces] == ["up"] * 64 + ["down"]


def _scores(seed):
    """With many ties, negative ones and infinite ones."""
    scores = torch.randn(7, 6, generator=torch.Generator().manual_seed(seed)).mul(3).round()
    return scores.masked_fill(scores == 4, torch.inf).masked_fill(scores == -4, -torch.inf)


def _keep_largest_of_all():
    edges = [0, 3, 3, 7]
    mine = slice(edges[dist.rank()], edges[dist.rank() + 1])
    return [keep_largest(_scores(seed)[mine], count, over_ranks=True) for seed in range(8) for count in (0, 1, 20, 42)]


def test_the_largest_of_all_ranks_are_those_of_one():
    for index, found in enumerate(zip(*run_ranks(_keep_largest_of_all, 3), strict=True)):
        expected = keep_largest(_scores(index // 4), (0, 1, 20, 42)[index % 4])
        assert torch.equal(torch.cat(found), expected)
