"""compress: the last fine-tune of config.compress.loss, quantised, exported, checked, and scored once more.

    sparse-PRECISION/   values and bits, for this package's runtime
    dense/              Hugging Face's layout with zeros for pruned weights, for other tools
"""

from typing import Any

from sparse_train import artifacts
from sparse_train.compress import export_dense, export_sparse, unpruned_zeros
from sparse_train.inference import load
from sparse_train.jobs.job import Job
from sparse_train.models import load_model, load_processor
from sparse_train.sparse import sparse_linears
from sparse_train.tasks import build_task, scored_examples


def run(job: Job) -> dict[str, Any]:
    config = job.config
    (source,) = job.inputs
    model, processor = load_model(source.path), load_processor(source.path, config.task.language)
    weights = {name: linear.weight for name, linear in sparse_linears(model).items()}
    task = build_task(config.task)
    examples, num_left_out = scored_examples(task, processor, config.evaluate)
    scores = {}
    for index, precision in enumerate(config.compress.precisions):
        folder = job.out / f"sparse-{precision}"
        export_sparse(model, processor, precision, folder, config.compress.int8_head)
        # On the kernels and the quantised weights of `generate`, in transformers' loop, whatever the batch.
        score = task.score(load(folder).model, processor, examples, config.evaluate,
                           job.progress_of_part(index, len(config.compress.precisions), precision))
        scores[precision] = score.metrics | {"num_left_out": num_left_out}
    export_dense(model, processor, job.out / "dense")
    if names := unpruned_zeros(job.out / "dense", weights):
        raise RuntimeError(f"the dense export differs from the sparse weights in {', '.join(names)}")
    metrics = {"loss": source.stage.model_name, "scores": scores, "num_bytes": _num_bytes(job)}
    artifacts.write_json(job.out / "scores.json", metrics)
    return metrics


def _num_bytes(job: Job) -> dict[str, int]:
    return {folder.name: sum(file.stat().st_size for file in folder.glob("*.safetensors"))
            for folder in sorted(job.out.iterdir()) if folder.is_dir()}
