"""The small pipeline on CUDA: the same stages, the device taken from DeepSpeed's accelerator."""

import pytest
import torch

from sparse_train import artifacts
from sparse_train.bench.gpu import device_layer_rows
from sparse_train.bench.layers import random_weights
from sparse_train.config import RunConfig
from sparse_train.config.load import load_config
from sparse_train.errors import UserError
from sparse_train.jobs import benchmark
from sparse_train.jobs.job import Job
from sparse_train.launch.run.cluster import ClusterConfig
from sparse_train.launch.run.stages import build_stages, find_stage
from tests.launch.test_pipeline import RECIPE, STAGES, _cli


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; torch sees none")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_pipeline_runs_on_cuda(precision, tmp_path, monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    _cli("run", RECIPE, f"folder={tmp_path}", "--on", "local", f"dense.precision={precision}",
         f"finetune.precision={precision}", "benchmark.devices=[cpu,gpu]")
    for stage in [stage for stage in STAGES if stage != "benchmark"] + ["benchmark/cpu", "benchmark/gpu"]:
        assert artifacts.damage(tmp_path / "tiny" / stage) is None
    rows = artifacts.read_json(tmp_path / "tiny" / "benchmark" / "gpu" / "rows.json")["rows"]
    assert {(row["what"], row["engine"]) for row in rows} == \
        {("linears", "torch"), ("linears", "expand"), ("linears", "sparse"), ("decode", "torch"), ("decode", "expand")}


def test_a_gpu_benchmark_without_a_gpu_is_one_line(monkeypatch, tmp_path):
    config = load_config(RunConfig, RECIPE, [f"folder='{tmp_path}'", "benchmark.devices=[gpu]"])
    stage = find_stage(config, "benchmark")
    assert (stage.id, stage.device) == ("benchmark", "gpu")
    monkeypatch.setattr("sparse_train.dist.device", lambda: torch.device("cpu"))
    with pytest.raises(UserError, match="sees no GPU"):
        benchmark.run(Job(config, stage, tmp_path, (), lambda *_: None))


def test_each_device_is_a_stage_and_the_report_reads_all():
    config = load_config(RunConfig, RECIPE, ["benchmark.devices=[cpu,gpu]"])
    found = {stage.id: stage for stage in build_stages(config)}
    assert {"benchmark/cpu", "benchmark/gpu"} <= {source.id for source in found["report"].inputs}
    cluster = ClusterConfig(executor="slurm", stages={"benchmark": {"partition": "cpu"},
                                                      "benchmark/gpu": {"partition": "gpu", "gpus_per_node": 1}})
    assert cluster.resources(found["benchmark/cpu"]).partition == "cpu"
    assert cluster.resources(found["benchmark/gpu"]).partition == "gpu"


def test_the_rows_of_a_device_are_those_of_the_layers():
    weights = random_weights(((64, 64), (32, 64)), 0.75)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where Triton interprets its kernels
    rows = device_layer_rows("m", weights, 2, 1e9, device)
    assert [(row["engine"], row["precision"], row["sparsity"]) for row in rows] == \
        [("torch", "bf16", 0.0), *((engine, "bf16", pytest.approx(0.75, abs=0.05)) for engine in ("expand", "sparse"))]
    kept = sum(weight.values.numel() for weight in weights)
    assert [row["bytes"] for row in rows[:2]] == [2 * (64 * 64 + 32 * 64), 2 * kept + 96 * 8]
    assert rows[2]["bytes"] > 3 * kept
