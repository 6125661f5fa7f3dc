"""compress: the last fine-tune of config.compress.loss, quantised, exported, checked, and scored once more.

    sparse-PRECISION/   values and bits, for this package's runtime
    dense/              Hugging Face's layout with zeros for pruned weights, for other tools
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

from sparse_train import artifacts, dist
from sparse_train.compat.transformers import to_device
from sparse_train.compress import (
    QUANTISERS,
    Codes,
    export_dense,
    export_sparse,
    round_compensated,
    unpruned_zeros,
)
from sparse_train.inference import load
from sparse_train.jobs.job import Job
from sparse_train.models import Processor, load_model, load_processor, open_model
from sparse_train.pruning import calibration_batches
from sparse_train.tasks import build_task, in_order, scored_examples


def run(job: Job) -> dict[str, Any]:
    config = job.config
    (source,) = job.inputs
    model, tensors = open_model(source.path)  # without data: both exports read and write one tensor after the other
    processor, task = load_processor(source.path, config.task.language), build_task(config.task)
    examples, num_left_out = scored_examples(task, processor, config.evaluate)
    scores = {}
    compensated = [precision for precision in config.compress.precisions
                   if config.compress.rounding == "compensated" and precision in QUANTISERS]
    num_parts = len(config.compress.precisions) + len(compensated)
    parts = (functools.partial(job.progress_of_part, part, num_parts) for part in itertools.count())
    for precision in config.compress.precisions:
        rounded = _round(job, processor, precision, next(parts)) if precision in compensated else None
        folder = job.out / f"sparse-{precision}"
        export_sparse(model, processor, precision, folder, config.compress.int8_head, rounded, tensors)
        # On the kernels and the quantised weights of `generate`, in transformers' loop, whatever the batch.
        score = task.score(load(folder, shared=False).model, processor, examples, config.evaluate,
                           functools.partial(in_order, progress=next(parts)(precision)))
        scores[precision] = score.metrics | {"num_left_out": num_left_out}
    export_dense(model, processor, job.out / "dense", tensors)
    if names := unpruned_zeros(job.out / "dense", ((name, tensors.weight(name)) for name in tensors.shapes)):
        raise RuntimeError(f"the dense export differs from the sparse weights in {', '.join(names)}")
    metrics = {"loss": source.stage.model_name, "scores": scores, "num_bytes": _num_bytes(job)}
    artifacts.write_json(job.out / "scores.json", metrics)
    return metrics


def _round(job: Job, processor: Processor, precision: str,
           part: Callable[[str], Callable[[int, int], None]]) -> dict[str, Codes]:
    """The codes of a copy of the model, compensated for what calibration shows of its inputs."""
    spec = job.config.prune
    return round_compensated(to_device(load_model(job.inputs[0].path), dist.device()),
                             calibration_batches(spec, job.config.task, processor), precision, spec.damping,
                             part(f"rounding to {precision}"))


def _num_bytes(job: Job) -> dict[str, int]:
    return {folder.name: sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            for folder in sorted(job.out.iterdir()) if folder.is_dir()}
