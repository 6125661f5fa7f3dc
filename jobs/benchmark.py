"""benchmark: the run's own model and the linears of MPT-7B, dense torch against sparse, against the byte bound.

    rows.json   {"machine": ..., "rows": [...]}; no time is asserted, ratios come from this one process

Models are those of the stage compress, in the kernels of the device.
"""

import functools
from pathlib import Path
from typing import Any

import torch

from sparse_train import artifacts, kernels
from sparse_train.bench import MPT_7B_BLOCK, decode_rows, layer_rows
from sparse_train.bench.gpu import device_bandwidth, device_decode_rows, device_layer_rows
from sparse_train.bench.layers import random_weights, sparsity_of
from sparse_train.config import EvaluateConfig
from sparse_train.cpus import cpu_name
from sparse_train.errors import UserError
from sparse_train.inference import gpu, load
from sparse_train.jobs.job import Job
from sparse_train.jobs.stage import Kind
from sparse_train.models import load_model, load_processor
from sparse_train.sparse import BitmaskTensor, sparse_linears
from sparse_train.tasks import Example, build_task, scored_examples

_GPU_BATCHES = (1, 16)


def run(job: Job) -> dict[str, Any]:
    machine, rows = _on_gpu(job) if job.stage.device == "gpu" else _on_cpu(job)
    artifacts.write_json(job.out / "rows.json", {"machine": machine, "rows": rows})
    return machine


def _on_cpu(job: Job) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    spec, name = job.config.benchmark, job.config.name
    bandwidth = kernels.read_bandwidth()
    rows = layer_rows(name, _run_weights(job), spec.repeats, bandwidth, job.progress_of_part(0, 3, "layers"))
    sparsity, compress = rows[-1]["sparsity"], Path(job.path_of(Kind.COMPRESS))
    runtimes = {(name, "torch", "fp32", 0.0): load(job.path_of(Kind.DENSE))}
    for precision in job.config.compress.precisions:
        runtimes[name, "sparse", precision, sparsity] = load(compress / f"sparse-{precision}", shared=False)
    rows += decode_rows(runtimes, _example(job), spec.new_tokens, spec.repeats, bandwidth,
                        job.progress_of_part(1, 3, "decode"))
    if spec.reference_layers == "mpt-7b":
        rows += layer_rows("mpt-7b block", _reference_weights(job), spec.repeats, bandwidth,
                           job.progress_of_part(2, 3, "mpt-7b block"))
    return {"device": cpu_name(), "threads": torch.get_num_threads(),
            "backend": kernels.backend(), "read_bandwidth_bytes_per_second": bandwidth}, rows


def _on_gpu(job: Job) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    spec, name = job.config.benchmark, f"{job.config.name} (gpu)"
    try:
        device = gpu.find_gpu()
    except UserError as error:
        raise UserError(f"benchmark.devices={list(spec.devices)}: {error}; on a cluster give the stage a GPU, "
                        "cluster.stages={benchmark/gpu: {gpus_per_node: 1}}, or leave gpu out") from error
    bandwidth, compress = device_bandwidth(device), Path(job.path_of(Kind.COMPRESS))
    names = sorted(job.config.compress.precisions, key=lambda name: name != "fp32")  # whose values become BF16
    folders: dict[str, Path] = {"bf16" if name == "fp32" else name: compress / f"sparse-{name}" for name in names}

    def layers(model: str, weights: list[BitmaskTensor], part: int) -> list[dict[str, Any]]:
        by_precision = dict.fromkeys(((precision, sparsity_of(weights)) for precision in folders), weights)
        return device_layer_rows(model, by_precision, spec.repeats, bandwidth, device,
                                 job.progress_of_part(part, 4, "layers"))

    rows = layers(name, _run_weights(job), 0)
    for part, batch in enumerate(_GPU_BATCHES, 1):
        loads = [functools.partial(load, folder, device="cuda", batch_size=batch)
                 for folder in (job.path_of(Kind.DENSE), *folders.values())]
        rows += device_decode_rows(loads, name, _example(job), spec.new_tokens, spec.repeats, bandwidth, device, batch,
                                   job.progress_of_part(part, 4, "decode"))
    if spec.reference_layers == "mpt-7b":
        rows += layers("mpt-7b block (gpu)", _reference_weights(job), 3)
    return {"device": torch.cuda.get_device_name(device), "read_bandwidth_bytes_per_second": bandwidth}, rows


def _run_weights(job: Job) -> list[BitmaskTensor]:
    return [linear.weight for linear in sparse_linears(load_model(job.path_of(Kind.FINETUNE))).values()]


def _reference_weights(job: Job) -> list[BitmaskTensor]:
    return random_weights(MPT_7B_BLOCK, job.config.prune.levels[-1].sparsity)


def _example(job: Job) -> Example:
    config = job.config
    processor = load_processor(job.path_of(Kind.DENSE), config.task.language)
    spec = EvaluateConfig(num_examples=1, max_new_tokens=config.benchmark.new_tokens)
    return scored_examples(build_task(config.task), processor, spec)[0][0]
