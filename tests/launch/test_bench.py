"""sparse-train bench train: what is printed is whole, and what does not depend on the machine is right."""

import json

import pytest
import torch

from sparse_train.launch.cli import main
from tests.launch.test_pipeline import _cli

_SIZE = ("--d-model", "128", "--n-layers", "2", "--num-tokens", "32", "--repeats", "1")


def _found(*arguments):
    return json.loads(_cli("bench", "train", "--json", *_SIZE, *arguments)[0].splitlines()[-1])


def _check(found):
    for name in ("masked", "ours"):
        assert found["step_time"][name]["median"] > 0
    assert found["state_bytes"]["ours"] < 1 < found["state_bytes"]["masked"]
    assert found["peak_memory"]["ours"] < found["peak_memory"]["masked"]


def test_ours_holds_and_moves_less_than_the_masked_way():
    found = _found()
    assert found["ranks"] == 2
    _check(found)
    assert found["traffic_bytes"]["ours"] < found["traffic_bytes"]["masked"]


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
