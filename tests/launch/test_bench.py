"""sparse-train bench train: what is printed is whole, and what does not depend on the machine is right."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sparse_train.bench.train import TrainBench, _Products
from sparse_train.launch.cli import main
from sparse_train.models import save_model
from sparse_train.training.head import Head
from tests.launch.test_pipeline import _cli
from tests.models import tiny_model

_STEP = ("--num-tokens", "32", "--repeats", "1")
_SIZE = ("--d-model", "128", "--n-layers", "2", *_STEP)


def _found(*arguments, size=_SIZE):
    return json.loads(_cli("bench", "train", "--json", *size, *arguments)[0].splitlines()[-1])


def _check(found):
    for name in ("masked", "ours"):
        assert found["step_time"][name]["median"] > 0
    assert found["state_bytes"]["ours"] < 1 < found["state_bytes"]["masked"]
    assert found["peak_memory"]["ours"] < found["peak_memory"]["masked"]


def test_ours_holds_and_moves_less_than_the_masked_way(tmp_path, capsys):
    """Of a model in a folder; the GPU's test below makes its own."""
    _, processor = tiny_model("mpt")
    model = TrainBench(d_model=128, n_layers=2, num_tokens=32).model()
    save_model(tmp_path, model, processor)
    found = _found("--model", tmp_path, size=_STEP)
    assert found["ranks"] == 2
    _check(found)
    for values in found["measured"].values():
        assert 0 < values["fraction_of_products"]["median"] < 2
    assert found["traffic_bytes"]["ours"] < found["traffic_bytes"]["masked"]
    for arguments, told in ((("--d-model", "64"), "are the size of an untrained MPT"),
                            (("--num-tokens", "33"), "has 32 positions; give fewer")):
        assert main(["bench", "train", "--model", str(tmp_path), *arguments]) == 2
        assert told in capsys.readouterr().err


def test_flops_of_a_step_are_those_that_torch_counts():
    torch.manual_seed(0)
    bench = TrainBench(d_model=64, n_layers=2, vocab_size=100, num_tokens=24)
    model, products = bench.model(), _Products(bench.model(), bench)
    head, inputs, counts = Head(model), {"input_ids": bench.batch([0]).input_ids}, []
    for num_positions in (bench.num_tokens, 0):
        with FlopCounterMode(display=False) as counter:
            logits = head.logits(model, inputs, torch.arange(num_positions))
            if num_positions:
                logits.sum().backward()
        counts.append(counter.get_total_flops())
    # The first layer's inputs need a gradient too: they come from a trained embedding.
    assert products.flops_of_step("dense") == counts[0]
    assert products.flops_of_step("ours") == sum(counts)


@pytest.mark.parametrize(("arguments", "told"), [
    (["layers", "--repeats", "0"], "--repeats"), (["moves", "--repeats", "-1"], "--repeats"),
    (["train", "--repeats", "many"], "--repeats"), (["train", "--ranks", "0"], "--ranks"),
    (["train", "--d-model", "100"], "100 is not a multiple of 64"), (["train", "--num-tokens", "1.5"], "--num-tokens"),
    (["layers", "--sparsity", "nan"], "outside [0, 1)")])
def test_numbers_that_leave_nothing_to_measure_are_refused(arguments, told, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", *arguments])
    assert stop.value.code == 2
    line, = capsys.readouterr().err.splitlines()
    assert told in line


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none")
def test_one_gpu_measures_its_step(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    found = _found("--ranks", "1", "--precision", "bf16")
    assert found["device"].startswith("cuda")
    _check(found)
