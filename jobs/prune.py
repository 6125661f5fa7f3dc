"""prune: a model and calibration batches -> the sparse student, each pruned weight a (values, bitmask) pair.

The model is the dense one, or the fine-tuned one of the level before, whose pruned weights stay pruned.
"""

from typing import Any

from sparse_train import dist
from sparse_train.compat.transformers import to_device
from sparse_train.jobs.job import Job
from sparse_train.models import load_model, load_processor, save_model
from sparse_train.pruning import calibration_batches, prune
from sparse_train.sparse import densify, sparse_linears, sparsify


def run(job: Job) -> dict[str, Any]:
    spec = job.config.prune.levels[job.stage.level]
    (source,) = job.inputs
    processor, model = load_processor(source.path, job.config.task.language), load_model(source.path)
    earlier = {name: linear.weight.keep.to(dist.device()) for name, linear in sparse_linears(model).items()}
    model = to_device(densify(model), dist.device())
    batches = calibration_batches(spec, job.config.task, processor) if spec.calibrates else ()
    weights = prune(model, batches, spec, job.progress, earlier)
    save_model(job.out, sparsify(model, weights), processor)
    num_kept = sum(weight.values.numel() for weight in weights.values())
    num_weights = sum(rows * columns for rows, columns in (weight.shape for weight in weights.values()))
    return {"sparsity": 1 - num_kept / num_weights, "num_prunable": num_weights,
            "layers": {name: weight.sparsity for name, weight in weights.items()}}
