"""The small pipeline on CUDA: the same stages, the device taken from DeepSpeed's accelerator."""

import functools

import pytest
import torch

from sparse_train import artifacts
from sparse_train.bench.gpu import device_decode_rows, device_layer_rows, random_runtime, weights_2_of_4
from sparse_train.bench.layers import random_weights
from sparse_train.compress import export_sparse
from sparse_train.config import ModelConfig, PruneConfig, RunConfig
from sparse_train.config.load import load_config
from sparse_train.errors import UserError
from sparse_train.inference import gpu
from sparse_train.jobs import benchmark
from sparse_train.jobs.job import Input, Job
from sparse_train.launch.run.cluster import ClusterConfig
from sparse_train.launch.run.stages import build_stages, find_stage
from sparse_train.models import save_model
from sparse_train.pruning import prune
from sparse_train.sparse import sparsify
from sparse_train.tasks import Example
from tests.launch.test_pipeline import RECIPE, STAGES, _cli
from tests.models import tiny_model

_NEEDS_GPU = [pytest.mark.gpu,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none")]
_EACH_DEVICE = pytest.mark.parametrize("device", [
    pytest.param(torch.device("cuda"), marks=_NEEDS_GPU),
    pytest.param(torch.device("cpu"), marks=pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there"))])


@pytest.mark.parametrize("precision", [pytest.param(name, marks=_NEEDS_GPU) for name in ("fp32", "bf16")])
def test_the_pipeline_runs_on_cuda(precision, tmp_path, monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    _cli("run", RECIPE, f"folder={tmp_path}", "--on", "local", f"dense.precision={precision}",
         f"finetune.precision={precision}", "benchmark.devices=[cpu,gpu]")
    for stage in [stage for stage in STAGES if stage != "benchmark"] + ["benchmark/cpu", "benchmark/gpu"]:
        assert artifacts.damage(tmp_path / "tiny" / stage) is None
    rows = artifacts.read_json(tmp_path / "tiny" / "benchmark" / "gpu" / "rows.json")["rows"]
    assert {(row["what"], row["engine"]) for row in rows} == \
        {(what, engine) for what in ("linears", "decode", "decode, batch 16") for engine in ("torch", "sparse")}
    assert all(row["memory"] > 0 for row in rows if row["what"] != "linears")


def test_a_gpu_benchmark_without_a_gpu_is_one_line(monkeypatch, tmp_path):
    config = load_config(RunConfig, RECIPE, [f"folder='{tmp_path}'", "benchmark.devices=[gpu]"])
    stage = find_stage(config, "benchmark")
    assert (stage.id, stage.device) == ("benchmark", "gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"benchmark\.devices=\['gpu'\]: cuda: .* cluster\.stages="):
        benchmark.run(Job(config, stage, tmp_path, (), lambda *_: None))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the whole pipeline runs there")
def test_the_stage_measures_the_compressed_models(tmp_path, monkeypatch):
    """On a stand-in for a GPU, whose kernels are interpreted."""
    model, processor = tiny_model("llama")
    model.config.max_position_embeddings = 256
    save_model(tmp_path / "dense", model, processor)
    sparsify(model, prune(model, [], PruneConfig(method="magnitude", sparsity=0.5)))
    save_model(tmp_path / "tuned", model, processor)
    export_sparse(model, processor, "bf16", tmp_path / "compressed" / "sparse-bf16")
    monkeypatch.setattr(gpu, "find_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "none")
    monkeypatch.setattr(benchmark, "_GPU_BATCHES", (1, 2))
    config = load_config(RunConfig, RECIPE, ["benchmark.devices=[gpu]", "benchmark.repeats=1", "benchmark.new_tokens=2",
                                             "compress.precisions=[fp32,bf16]", "compress.rounding=nearest"])
    stage = find_stage(config, "benchmark")
    inputs = tuple(Input(source, tmp_path / name)
                   for source, name in zip(stage.inputs, ("dense", "tuned", "compressed"), strict=True))
    benchmark.run(Job(config, stage, tmp_path, inputs, lambda *_: None))
    rows = artifacts.read_json(tmp_path / "rows.json")["rows"]
    assert [(row["what"], row["engine"], row["precision"], row["sparsity"]) for row in rows] == \
        [(what, engine, "bf16", sparsity) for what in ("linears", "decode", "decode, batch 2")
         for engine, sparsity in (("torch", 0.0), ("sparse", 0.5))]


def test_each_device_is_a_stage_and_the_report_reads_all():
    config = load_config(RunConfig, RECIPE, ["benchmark.devices=[cpu,gpu]"])
    found = {stage.id: stage for stage in build_stages(config)}
    assert {"benchmark/cpu", "benchmark/gpu"} <= {source.id for source in found["report"].inputs}
    cluster = ClusterConfig(executor="slurm", stages={"benchmark": {"partition": "cpu"},
                                                      "benchmark/gpu": {"partition": "gpu", "gpus_per_node": 1}})
    assert cluster.resources(found["benchmark/cpu"]).partition == "cpu"
    assert cluster.resources(found["benchmark/gpu"]).partition == "gpu"


@_EACH_DEVICE
def test_the_rows_of_a_device_are_those_of_the_layers(device, monkeypatch):
    monkeypatch.setattr("sparse_train.bench.gpu._GRAPH_LAUNCHES", 4)
    weights = random_weights(((64, 64), (32, 64)), 0.75, device=device)
    rows = device_layer_rows("m", {("bf16", 0.75): weights}, 2, 1e9, device)
    assert [(row["what"], row["engine"], row["precision"], row["sparsity"]) for row in rows] == \
        [("linears", "torch", "bf16", 0.0), ("linears", "sparse", "bf16", 0.75)]
    kept = sum(weight.values.numel() for weight in weights)
    assert rows[0]["bytes"] == 2 * (64 * 64 + 32 * 64) and rows[1]["bytes"] > 2 * kept
    assert all(weight.values.numel() == 64 * 64 // 2 and weight.keep.view(-1, 4).sum(1).eq(2).all()
               for weight in weights_2_of_4(((64, 64),), device))


@_EACH_DEVICE
@pytest.mark.slow
def test_models_of_a_size_are_made_and_decoded_on_a_device(device):
    size = ModelConfig(family="llama", d_model=32, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=48, max_seq_len=64,
                       vocab_size=300)
    loads = [functools.partial(random_runtime, size, variant, 1, device) for variant in (None, ("bf16", 0.5))]
    rows = [row for batch in (1, 2) for row in
            device_decode_rows(loads, "m", Example("Tom", ""), 3, 1, 1e9, device, batch)]
    assert [(row["what"], row["engine"], row["precision"], row["sparsity"]) for row in rows] == \
        [(what, engine, "bf16", sparsity) for what in ("decode", "decode, batch 2")
         for engine, sparsity in (("torch", 0.0), ("sparse", pytest.approx(0.5, abs=0.02)))]
    for row in rows:
        batch = 2 if "batch" in row["what"] else 1
        assert row["tokens_per_second"] == pytest.approx(1e3 * batch / row["milliseconds"])
