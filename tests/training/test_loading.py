"""Loading under ZeRO-3: each rank its slices, no rank a whole model, and the teacher lets go of what it gathers."""

import threading

import psutil
import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn
from transformers import MptConfig, MptForCausalLM

from sparse_train import dist
from sparse_train.config import TeacherConfig, TrainConfig, ZeroConfig
from sparse_train.errors import UserError
from sparse_train.models import own_tensors, save_model
from sparse_train.sparse import format as sparse_format
from sparse_train.sparse import sparse_linears
from sparse_train.training import audit, gathered_tensors, load_student, load_teacher
from sparse_train.training.bits import digest_bits
from sparse_train.training.engine import build_student, build_teacher
from tests.model_types import built
from tests.models import tiny_model, tiny_tokenizer
from tests.ranks import run_ranks
from tests.training.plain import Float64, assert_as_exact
from tests.training.test_parity import _models

_CONFIG = TrainConfig(zero=ZeroConfig(persistence_threshold=0))


def _load(path):
    model = load_student(path, _CONFIG)
    sizes = {name: parameter.ds_tensor.numel() for name, parameter in model.named_parameters()}
    return sizes, dict(gathered_tensors(build_student(model, _CONFIG)))


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_slices_make_up_the_checkpoint(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(sparse_format, "_FILE_BYTES", 10_000)
    model = _models()[0 if kind == "sparse" else 1]
    save_model(tmp_path, model, tiny_tokenizer())
    assert len(list(tmp_path.glob("*.safetensors"))) > 2  # tensors lie in several files
    for sizes, tensors in run_ranks(_load, 3, tmp_path):
        for name, tensor in own_tensors(model).items():
            assert sizes[name] == -(-tensor.numel() // 3), name
            assert torch.equal(tensors[name], tensor), name


def _load_each(path):
    return {folder.name: _load(folder)[1] for folder in sorted(path.iterdir())}


def test_what_lies_otherwise_in_the_file_is_sliced_too(tmp_path):
    """A head of its own beside the embedding; other names (GPT-NeoX); experts one by one; positions that are computed
    (Marian's)."""
    model, processor = tiny_model("t5-gated")
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.shared.weight))
    save_model(tmp_path / "t5", model, processor)
    models = {"t5": model}
    for model_type in ("gpt_neox", "qwen3_moe", "marian"):
        models[model_type] = built(model_type)
        models[model_type].save_pretrained(tmp_path / model_type)
    for found in run_ranks(_load_each, 2, tmp_path):
        assert "lm_head.weight" in found["t5"]
        for name, model in models.items():
            own = own_tensors(model)
            assert found[name].keys() == own.keys()
            assert all(torch.equal(found[name][key], tensor) for key, tensor in own.items()), name


def _refusal(path):
    with pytest.raises(UserError) as error:
        load_student(path, _CONFIG)
    return str(error.value)


def test_bits_that_do_not_belong_to_their_values_are_named(tmp_path):
    model = _models()[0]
    name, linear = next(iter(sparse_linears(model).items()))
    linear.bitmask.data[0, 0] ^= 1
    save_model(tmp_path, model, tiny_tokenizer())
    assert run_ranks(_refusal, 1, tmp_path)[0].startswith(f"{tmp_path}: {name} keeps")


def _flipped(path):
    model = load_student(path, _CONFIG)
    linear = next(module for module in model.modules() if hasattr(module, "bitmask"))
    if dist.rank() == 1:
        linear.bitmask.ds_tensor[0] ^= 1
    bits = digest_bits(model)
    engine = build_student(model, _CONFIG)
    if dist.rank() == 0:
        save_model(path / "out", model, tiny_tokenizer(), gathered_tensors(engine))
    else:
        list(gathered_tensors(engine))
    return bits


def test_the_audit_finds_bits_that_are_not_the_trained_ones(tmp_path):
    model = _models()[0]
    save_model(tmp_path, model, tiny_tokenizer())
    before = digest_bits(model)
    after = run_ranks(_flipped, 2, tmp_path)[0]
    assert [name for name in before if before[name] != after[name]] == ["transformer.blocks.0.attn.Wqkv"]
    audit(tmp_path, before)
    with pytest.raises(Exception, match=r"blocks.0.attn.Wqkv"):
        audit(tmp_path / "out", before)


def _peak_of_loading(path):
    process, base, peak, done = psutil.Process(), 0, 0, threading.Event()

    def watch():
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    load_student(path / "small", _CONFIG)  # whatever the first load of any model costs
    base = process.memory_info().rss
    thread = threading.Thread(target=watch)
    thread.start()
    model = load_student(path / "large", _CONFIG)
    done.set()
    thread.join()
    return peak - base, sum(p.ds_tensor.nbytes for p in model.parameters())


def test_loading_a_gigabyte_on_two_ranks_stays_below_the_share_and_two_tensors(tmp_path):
    save_model(tmp_path / "small", _models()[1], tiny_tokenizer())
    with torch.device("meta"):
        model = MptForCausalLM(MptConfig(d_model=2048, n_heads=16, n_layers=4, vocab_size=20000))
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.5)
    largest = max(parameter.nbytes for parameter in model.parameters())
    total = sum(parameter.nbytes for parameter in model.parameters())
    assert total > 9e8
    save_model(tmp_path / "large", model, tiny_tokenizer())
    del model
    for peak, share in run_ranks(_peak_of_loading, 2, tmp_path):
        assert share < 0.51 * total
        assert peak < share + 2 * largest, f"{peak / 1e6:.0f} MB over {share / 1e6:.0f} + 2 * {largest / 1e6:.0f}"


def _teach(path, config):
    teacher = build_teacher(load_teacher(path, _CONFIG, config), _CONFIG, config)
    teacher.train()  # as DeepSpeed's and transformers' helpers do
    assert not any(module.training for module in teacher.module.modules())
    inputs = {"input_ids": torch.arange(12).view(2, 6), "use_cache": False}
    for _ in range(2):
        with torch.no_grad():
            logits = teacher(**inputs).logits
    left = [name for name, p in teacher.module.named_parameters() if p.ds_status != ZeroParamStatus.NOT_AVAILABLE]
    grads = [name for name, p in teacher.module.named_parameters() if p.requires_grad or p.grad is not None]
    return logits.float(), left, grads, str(next(teacher.module.parameters()).ds_tensor.dtype)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("offload", [False, True])
def test_the_teacher_only_answers_and_keeps_nothing_gathered(precision, offload, tmp_path):
    model = _models()[1].eval()
    save_model(tmp_path, model, tiny_tokenizer())
    config = TeacherConfig(precision=precision, offload=offload, persistence_threshold=0)
    inputs = {"input_ids": torch.arange(12).view(2, 6), "use_cache": False}
    asked = torch.float32 if precision == "fp32" else torch.bfloat16
    with torch.no_grad():
        plain = model.to(asked)(**inputs).logits
        with Float64():
            exact = _models()[1].eval().double()(**inputs).logits
    for logits, left, grads, dtype in run_ranks(_teach, 2, tmp_path, config):
        assert not left and not grads and dtype == ("torch.float32" if precision == "fp32" else "torch.bfloat16")
        assert_as_exact("logits", logits, plain, exact, asked)
