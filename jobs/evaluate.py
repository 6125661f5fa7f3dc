"""evaluate: the task's score of the dense model, the one-shot pruned one and every fine-tune, on the same examples."""

import json
from typing import Any

from jobs.job import Job
from sparse_train import dist
from sparse_train.artifacts import write_json
from sparse_train.models import load_model, load_processor
from sparse_train.sparse import densify
from sparse_train.tasks import build_task


def run(job: Job) -> dict[str, Any]:
    spec, task = job.config.evaluate, build_task(job.config.task)
    examples = task.examples("test", spec.num_examples)
    metrics = {}
    for index, (stage, folder) in enumerate(job.inputs.items()):
        name = stage.rpartition("/")[2]
        # Batches of many tokens are what dense matrix products are for; the score does not depend on it.
        model = densify(load_model(folder)).to(dist.device())
        score = task.score(
            model, load_processor(folder), examples, spec,
            lambda done, total, index=index, name=name: job.progress(
                index * total + done, len(job.inputs) * total, name))
        metrics[name] = score.metrics
        with open(job.out / f"{name}.jsonl", "w") as file:
            file.writelines(json.dumps(sample) + "\n" for sample in score.samples)
    write_json(job.out / "scores.json", metrics)
    return metrics
