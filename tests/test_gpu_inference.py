"""Models on a GPU. Without one, Triton interprets the kernels, on tensors in CPU memory."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparse_train.compress import export_sparse
from sparse_train.config import EvaluateConfig, PruneConfig
from sparse_train.errors import UserError
from sparse_train.inference import PackedLinear, Runtime, decoder, decoding, gpu, load
from sparse_train.launch.cli import main
from sparse_train.models import save_model
from sparse_train.pruning import prune
from sparse_train.sparse import sparsify
from sparse_train.tasks import generate
from tests.models import tiny_examples, tiny_model

steps = pytest.importorskip("sparse_train.kernels.triton_steps")
_HAS_GPU = torch.cuda.is_available()
_NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not _HAS_GPU, reason="needs a CUDA device; torch sees none")]
_DEVICE = torch.device("cuda" if _HAS_GPU else "cpu")
_SPEC = EvaluateConfig(max_new_tokens=4)


@pytest.fixture(params=[pytest.param("cuda", marks=_NEEDS_GPU), pytest.param("cpu", marks=pytest.mark.skipif(
    _HAS_GPU, reason="Triton compiles its kernels for the GPU instead"))])
def on_gpu(request, monkeypatch):
    """`load(..., device="cuda")` and Decoders go to the stand-in where there is no GPU."""
    if request.param == "cpu":
        monkeypatch.setattr(gpu, "find_gpu", lambda: _DEVICE)
        monkeypatch.setattr(decoder, "steps_for", steps.GraphSteps)


def _sparse_model(family):
    model, processor = tiny_model(family)
    return sparsify(model, prune(model, [], PruneConfig(method="magnitude", sparsity=0.5))), processor


@pytest.mark.parametrize("family", ["llama", *(pytest.param(family, marks=pytest.mark.slow)
                                               for family in ("qwen3", "mpt", "t5-gated", "whisper"))])
def test_steps_of_a_gpu_say_what_transformers_loop_says(family, on_gpu):
    """A model in FP32, so that what they round differently decides no token; rows of different lengths."""
    model, processor = tiny_model(family)
    runtime, examples = Runtime(model.to(_DEVICE), processor), tiny_examples(processor)[:2]
    assert runtime.generate(examples, 4) == generate(runtime.model, processor, examples, _SPEC)


@pytest.mark.parametrize("precision", ["fp32", *(pytest.param(precision, marks=pytest.mark.slow)
                                                 for precision in ("bf16", "int8", "int4"))])
@torch.no_grad()
def test_a_sparse_folder_computes_what_it_does_on_the_cpu(precision, on_gpu, tmp_path):
    """Up to the rounding of BF16 here, and of activations that become INT8 there."""
    model, processor = _sparse_model("llama")
    export_sparse(model, processor, precision, tmp_path, int8_head=True)
    runtime = load(tmp_path, device="cuda")
    assert runtime.is_sparse and runtime.precision == {"fp32": "bf16"}.get(precision, precision)
    assert runtime.sparsity == pytest.approx(0.5, abs=0.01)
    assert {p.dtype for p in runtime.model.parameters()} == {torch.bfloat16}
    assert {p.device.type for p in runtime.model.parameters()} == {_DEVICE.type}
    linears = [module for module in runtime.model.modules() if isinstance(module, PackedLinear)]
    assert len(linears) == 14
    tokens = torch.arange(2, 5, device=_DEVICE)[None]
    expected, found = load(tmp_path, shared=False).model(tokens.cpu()).logits, runtime.model(tokens).logits
    assert found.dtype == torch.bfloat16
    assert (found.cpu() - expected).norm() < 0.03 * expected.norm()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cuda")
    assert torch.equal(theirs(tokens).logits, found)
    theirs.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/sparse.safetensors").read_bytes() == (tmp_path / "sparse.safetensors").read_bytes()


def test_a_dense_folder_is_in_bf16(on_gpu, tmp_path):
    model, processor = tiny_model("mpt")
    save_model(tmp_path, model, processor)
    runtime = load(tmp_path, device="cuda")
    assert not runtime.is_sparse and runtime.precision == "bf16"
    for name, parameter in runtime.model.named_parameters():
        assert torch.equal(parameter.cpu(), model.get_parameter(name).bfloat16())


def test_without_a_gpu_that_can_run_it_there_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", None)
    for command in (["generate", str(tmp_path), "--prompt", "a"], ["bench", "layers"], ["bench", "moves"],
                    ["bench", "decode", "--shape", "llama-8b"], ["bench", "train"]):
        assert main([*command, "--device", "cuda"]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and "is built without CUDA" in told, command
    assert main(["bench", "decode", "--shape", "mpt-7b-block", "--device", "cuda"]) == 2
    assert "with one of mpt-7b, llama-8b" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"is built without CUDA"):
        gpu.find_gpu()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch sees no GPU"):
        gpu.find_gpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(UserError, match=r"Tesla T4 has compute capability 7\.5, and the kernels need 8\.0"):
        gpu.find_gpu()
    monkeypatch.setattr("sparse_train.extras.EXTRAS", {"cuda": ("no_such_package",)})
    with pytest.raises(UserError, match=r"pip install 'sparse-train\[cuda\]'"):
        gpu.find_gpu()


def test_too_little_memory_is_one_line(monkeypatch, tmp_path):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore of it")

    model, processor = tiny_model("mpt")
    with monkeypatch.context() as patched:
        patched.setitem(Runtime.generate.__globals__, "generate", fail)
        with pytest.raises(UserError, match=r"does not hold 2 answers at a time \(CUDA out of memory.*; give fewer"):
            Runtime(model, processor).complete_all(["1", "2"])
    monkeypatch.setattr(gpu, "find_gpu", lambda: _DEVICE)
    monkeypatch.setitem(load.__globals__, "open_model", fail)
    with pytest.raises(UserError, match="give a smaller or sparser model"):
        load(tmp_path, device="cuda")


def test_a_decoder_is_kept_for_texts_that_it_has_room_for(monkeypatch):
    class Made:
        def __init__(self, model, num_rows, capacity, num_states, kv_cache="fp32"):
            self.num_rows, self.capacity, self.num_states = num_rows, capacity, num_states

    monkeypatch.setattr(decoding, "Decoder", Made)
    decoders, model = decoding.Decoders(), torch.nn.Module()
    model.device = torch.device("cuda")
    first = decoders.get(model, 1, 100, 0)
    assert first.capacity == 256 and decoders.get(model, 1, 256, 0) is first
    assert decoders.get(model, 1, 257, 0).capacity == 512
    assert decoders.get(model, 2, 100, 0).num_rows == 2
    states = decoders.get(model, 2, 100, 5)
    assert states.num_states == 256 and decoders.get(model, 2, 100, 256) is states is decoders.get(model, 2, 100, 3)
    assert decoders.get(model, 2, 100, 257).num_states == 512
    model.device = torch.device("cpu")
    assert decoders.get(model, 1, 100, 0).capacity == 100


@pytest.mark.parametrize("family", [pytest.param(family, marks=_NEEDS_GPU)
                                    for family in ("llama", "qwen3", "mpt", "t5-gated", "whisper")])
def test_a_graph_says_what_its_steps_say_one_by_one(family, tmp_path, monkeypatch):
    """Greedily and sampled, twice, so that the second batch finds the graph of the first."""
    model, processor = _sparse_model(family)
    export_sparse(model, processor, "bf16", tmp_path)
    examples, said = tiny_examples(processor), []
    for is_graphed in (True, False):
        if not is_graphed:
            monkeypatch.setattr(steps, "CudaGraph", lambda launch, device: launch)
        runtime = load(tmp_path, device="cuda")
        for settings in ({}, {"do_sample": True, "top_k": 5}, {}):
            torch.manual_seed(0)
            said.append(runtime.generate(examples, 20, settings=settings, until_end=False))
    assert said[:3] == said[3:] and said[0] == said[2]
