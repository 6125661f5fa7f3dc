"""sparse-train bench: what is printed is whole, and what does not depend on the machine is right."""

import itertools
import json
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.mpt.modeling_mpt import MptBlock

from sparse_train import kernels
from sparse_train.bench import serve
from sparse_train.bench.prune import MODEL_TOKENS, BlockCost, LinearCost
from sparse_train.bench.timing import Timing
from sparse_train.bench.train import TrainBench, _Products
from sparse_train.config import TaskConfig
from sparse_train.launch.cli import main
from sparse_train.models import family_of, load_model, load_processor, save_model
from sparse_train.sparse import BitmaskTensor, sparsify
from sparse_train.tasks import build_task, training_examples
from sparse_train.training.head import Head
from tests.launch.test_pipeline import _cli
from tests.models import tiny_model
from tests.training.plain import states_of

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


def _features_by_hand(ratio, s, t):
    """SquareHead's share of a block from states (N, D) of real tokens."""
    error, energy = (s - t).square(), t.square()
    if ratio == "token":
        return (error.sum(1) / energy.sum(1)).mean()
    if ratio == "channel":
        return (error.sum(0) / energy.sum(0)).mean()
    logs = energy.sum(1).log()
    kept = logs <= logs.mean() + 2 * math.log(10) if ratio == "typical" else logs < math.inf
    return error[kept].sum() / energy[kept].sum()


def _losses_by_hand(student, teacher, batch):
    """(features, ratio) -> loss; the teacher's features."""
    (logits, states), (taught, taught_states) = (states_of(model, batch.inputs()) for model in (student, teacher))
    chosen = batch.targets != -100
    log_probs, taught_probs = logits[chosen].log_softmax(-1), taught[chosen].softmax(-1).detach()
    losses = {("task", "", ""): -log_probs.gather(1, batch.targets[chosen][:, None]).mean(),
              ("logit", "", ""): (taught_probs * (taught_probs.log() - log_probs)).sum(1).mean()}
    blocks = [(s[batch.attend], taught_states[name][batch.attend].detach()) for name, s in states.items()]
    norms = [[*(block.input_layernorm for block in model.model.layers[1:]), model.model.norm]
             for model in (student, teacher)]
    normed = [(a(s), b(t).detach()) for (s, t), a, b in zip(blocks, *norms, strict=True)]
    return losses | {("feature", features, ratio): sum(_features_by_hand(ratio, s, t) for s, t in pairs)
                     for features, pairs in (("blocks", blocks), ("norms", normed))
                     for ratio in ("block", "token", "typical", "channel")}, [t for _, t in blocks]


def test_each_loss_has_the_gradient_of_its_plain_formula(tmp_path, capsys):
    """Of a teacher with massive tokens, over two batches; and models that do not go together are refused."""
    teacher, processor = tiny_model("llama")
    teacher.config.max_position_embeddings = 256
    for parameter in teacher.parameters():
        parameter.data.mul_(4 if parameter.ndim > 1 else 1)
    teacher.get_input_embeddings().weight.data[processor.tokenizer("Question").input_ids[0]].mul_(1e3)
    save_model(tmp_path / "dense", teacher, processor)
    student = sparsify(teacher, {
        name: BitmaskTensor.from_dense(linear.weight.detach(), torch.rand_like(linear.weight) < 0.5)
        for name, linear in family_of(teacher).prunable_linears(teacher).items()})
    save_model(tmp_path / "pruned", student, processor)
    command = ["bench", "losses", "tests/launch/tiny.yaml", "--batches", "2", "--student", str(tmp_path / "pruned")]
    assert main([*command, "--teacher", str(tmp_path / "dense")]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])

    student, teacher = load_model(tmp_path / "pruned"), load_model(tmp_path / "dense")
    task = build_task(TaskConfig(name="arithmetic"))
    examples = training_examples(task, load_processor(tmp_path / "dense", None), 4)[0]
    expected, largest = [], []
    for start in (0, 2):
        batch = task.batch([examples[start], examples[start + 1]], processor)
        losses, features = _losses_by_hand(student, teacher, batch)
        gradients = {key: torch.cat([part.flatten() for part in torch.autograd.grad(
            loss, [p for p in student.parameters() if p.requires_grad], retain_graph=True, materialize_grads=True)])
            for key, loss in losses.items()}
        expected.append({key: [losses[key].item(), gradient.norm().item(), torch.cosine_similarity(
            gradient, gradients["task", "", ""], dim=0).item()] for key, gradient in gradients.items()})
        largest.append([(norms.max() / norms.median()).item() for norms in (t.norm(dim=1) for t in features)])
    means = {key: [(a + b) / 2 for a, b in zip(expected[0][key], expected[1][key], strict=True)] for key in expected[0]}
    assert [(row["term"], row["features"], row["ratio"]) for row in found["rows"]] == list(means)
    of_block = means["feature", "blocks", "block"][1]
    for row, (value, gradient, cosine) in zip(found["rows"], means.values(), strict=True):
        assert [row[key] for key in ("value", "gradient", "cosine", "weight")] == pytest.approx(
            [value, gradient, cosine, of_block / gradient], rel=1e-4, abs=1e-6)
    assert list(found["largest_tokens"].values()) == pytest.approx(
        [sum(pair) / 2 for pair in zip(*largest, strict=True)], rel=1e-5)
    assert max(largest[0]) > 10

    save_model(tmp_path / "other", tiny_model("mpt")[0], processor)
    for arguments, told in ((("--teacher", str(tmp_path / "other")), "not of one type and size"),
                            (("--teacher", str(tmp_path / "dense"), "--student", str(tmp_path / "dense")),
                             "has no sparse layer"),
                            (("--teacher", str(tmp_path / "pruned")), "computes what the teacher does")):
        assert main([*command, *arguments]) == 2
        assert told in capsys.readouterr().err


def test_a_block_is_pruned_by_phases_and_whole_models_are_counted_from_them(capsys, monkeypatch):
    """5,000 tokens are two whole examples. Only the first one's pass for statistics goes on to the block's end."""
    forward, ended = MptBlock.forward, []
    monkeypatch.setattr(MptBlock, "forward", lambda *args, **kwargs: [forward(*args, **kwargs), ended.append(1)][0])
    command = ["bench", "prune", "--width", "128", "--tokens", "5000", "--methods"]
    assert main([*command, "magnitude,sparsegpt"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert "262,144 calibration tokens" in table[-1] and "4,096 tokens" in table[0] and len(found["rows"]) == 2
    assert len(ended) == 2 + 3  # sparsegpt's, of the warm-up and of the measurement
    assert [row["method"] for row in found["rows"]] == ["magnitude", "sparsegpt"]
    for row, is_read in zip(found["rows"], (False, True), strict=True):
        seconds, linears = row["seconds"], {}
        assert [seconds[phase] > 0 for phase in ("forward", "statistics", "decompositions")] == [is_read] * 3
        for phase in ("decompositions", "updates"):
            parts = {name: linear[phase] for name, linear in row["linears"].items()}
            assert sorted(parts) == ["Wqkv", "down_proj", "out_proj", "up_proj"]
            assert sum(parts.values()) == pytest.approx(seconds[phase])
            linears |= {name: linears.get(name, 0.0) + part for name, part in parts.items()}
        power = 3 if is_read else 2
        for name, num_devices, whole in row["models"]:
            scale, num_blocks = (4096 / 128, 32) if name == "MPT-7B" else (7168 / 128, 48)
            passes = (seconds["forward"] + seconds["statistics"]) * 262_144 / 4096 / num_devices
            pruned = sum(linears.values()) if num_devices == 1 else max(linears.values())
            assert whole == pytest.approx(
                num_blocks * (scale**2 * (passes + seconds["other"]) + scale**power * pruned))
    assert main([*command, "wanda,obert"]) == 2
    assert "obert prunes by gradients of a whole model's loss" in capsys.readouterr().err


def test_devices_that_share_the_rows_of_a_linear_each_decompose_its_hessian():
    """At twice the width `down` has two panels of rows, so of eight devices two have one, and another has `up`."""
    seconds = {"forward": 0.0, "statistics": 0.0, "decompositions": 17.0, "other": 0.5}
    cost = BlockCost("admm", 256, MODEL_TOKENS, seconds,
                     {"up": LinearCost((1024, 256), 1.0, 8.0), "down": LinearCost((256, 1024), 16.0, 16.0)}, True)
    for num_devices, pruned in ((1, 41), (2, 16 + 8 + 9), (8, 16 + 9)):
        assert cost.of_model(512, 10, num_devices) == 10 * (4 * 0.5 + 8 * pruned)


@pytest.mark.parametrize(("arguments", "told"), [
    (["prune", "--methods", "wanda,x"], "there is no pruning method x; choose from: magnitude"),
    (["prune", "--width", "100"], "100 is not a multiple of 64"),
    (["layers", "--repeats", "0"], "--repeats"), (["moves", "--repeats", "-1"], "--repeats"),
    (["train", "--repeats", "many"], "--repeats"), (["train", "--ranks", "0"], "--ranks"),
    (["train", "--d-model", "100"], "100 is not a multiple of 64"), (["train", "--num-tokens", "1.5"], "--num-tokens"),
    (["losses", "demo", "--student", "x", "--teacher", "y", "--batches", "0"], "--batches"),
    (["layers", "--sparsity", "nan"], "outside [0, 1)")])
def test_numbers_that_leave_nothing_to_measure_are_refused(arguments, told, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", *arguments])
    assert stop.value.code == 2
    line, = capsys.readouterr().err.splitlines()
    assert told in line


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none")])])
def test_moves_are_rows_of_a_device(device, monkeypatch, capsys):
    monkeypatch.setattr("sparse_train.bench.moves._SHAPE", (128, 256))
    monkeypatch.setattr("sparse_train.bench.moves._GPU_BYTES", 1 << 20)
    assert main(["bench", "moves", "--device", device, "--sparsity", "0.5", "--repeats", "1"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    backends = kernels.backends() if device == "cpu" else ("triton",)
    assert [(row["dtype"], row["backend"], row["kernel"]) for row in rows] == list(itertools.product(
        ("float32", "bfloat16"), backends, ("expand", "compact")))
    assert all(row["milliseconds"] > 0 and row["fraction_of_copy"] > 0 for row in rows)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none")
def test_one_gpu_measures_its_step(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    found = _found("--ranks", "1", "--precision", "bf16")
    assert found["device"].startswith("cuda")
    _check(found)


def test_a_server_that_is_faster_only_now_and_then_gains_nothing(tmp_path, capsys):
    dense, clear, doubtful = Timing((2.0, 2.0, 2.0)), Timing((1.0, 1.1, 0.9)), Timing((1.0, 2.2, 2.1))
    assert serve._row("a", 8, 10, clear, dense)["gains"] and not serve._row("a", 8, 10, doubtful, dense)["gains"]
    row = serve._row("a", 8, 10, clear, dense)
    assert (row["tokens_per_second"], row["speedup"]) == (80.0, 2.0) and row["low"] < 80 < row["high"]
    assert main(["bench", "serve", "--model", str(tmp_path), "--python", str(tmp_path / "python")]) == 2
    assert "is not there; run make serve" in capsys.readouterr().err
