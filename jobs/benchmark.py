"""benchmark: the run's own model and the linears of MPT-7B, dense torch against sparse, against the byte bound.

    rows.json   {"machine": ..., "rows": [...]}; no time is asserted, ratios come from this one process
"""

import platform
from typing import Any

import torch

from jobs.job import Job
from sparse_train import artifacts, kernels
from sparse_train.bench import MPT_7B_BLOCK, decode_rows, layer_rows
from sparse_train.bench.layers import random_weights
from sparse_train.inference import load
from sparse_train.models import load_model
from sparse_train.sparse import sparse_linears
from sparse_train.tasks import build_task


def run(job: Job) -> dict[str, Any]:
    config, spec = job.config, job.config.benchmark
    bandwidth = kernels.read_bandwidth()
    student = load_model(job.input_of("finetune"))
    rows = layer_rows(config.name, [linear.weight for linear in sparse_linears(student).values()], spec.repeats,
                      bandwidth, _stage(job, 0, "own layers"))
    rows += _decode(job, bandwidth, rows[-1]["sparsity"])
    if spec.reference_layers == "mpt-7b":
        weights = random_weights(MPT_7B_BLOCK, config.prune.levels[-1].sparsity)
        rows += layer_rows("mpt-7b block", weights, spec.repeats, bandwidth, _stage(job, 2, "mpt-7b block"))
    machine = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
               "backend": kernels.backend(), "read_bandwidth_bytes_per_second": bandwidth}
    artifacts.write_json(job.out / "rows.json", {"machine": machine, "rows": rows})
    return machine


def _decode(job: Job, bandwidth: float, sparsity: float) -> list[dict[str, Any]]:
    spec, compress = job.config.benchmark, job.inputs["compress"]
    runtimes = {("torch", "fp32", 0.0): load(job.inputs["dense"])}
    for precision in job.config.compress.precisions:
        if precision != "bf16":  # computed in fp32, so it would be the same row twice
            runtimes["sparse", precision, sparsity] = load(compress / f"sparse-{precision}")
    example = build_task(job.config.task).examples("test", 1)[0]
    return decode_rows(job.config.name, runtimes, example, spec.new_tokens, spec.repeats, bandwidth,
                       _stage(job, 1, "decode"))


def _stage(job: Job, index: int, note: str):
    return lambda done, total: job.progress(index * total + done, 3 * total, note)
