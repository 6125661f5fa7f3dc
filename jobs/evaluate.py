"""evaluate: the task's score of the dense, the one-shot and every fine-tuned model, on the same examples; and what each
of them has kept of general text (evaluate.texts)."""

import itertools
import json
from typing import Any

from sparse_train import dist
from sparse_train.artifacts import write_json
from sparse_train.compat.transformers import to_device
from sparse_train.jobs.job import Job
from sparse_train.models import DTYPES, load_model, load_processor
from sparse_train.sparse import densify, sparse_linears
from sparse_train.tasks import build_task, scored_examples
from sparse_train.tasks.general_text import GeneralText


def run(job: Job) -> dict[str, Any]:
    spec, task = job.config.evaluate, build_task(job.config.task)
    processor = load_processor(job.inputs[0].path, job.config.task.language)  # all inputs have the same
    examples, num_left_out = scored_examples(task, processor, spec)
    texts = {name: GeneralText(text, processor, spec) for name, text in spec.texts.items()}
    rows: list[dict[str, Any]] = []
    num_parts = len(job.inputs) * (1 + len(texts))
    for index, source in enumerate(job.inputs):
        stage, model = source.stage, load_model(source.path, DTYPES[spec.precision])
        linears = sparse_linears(model).values()
        num_weights = sum(linear.in_features * linear.out_features for linear in linears)
        sparsity = 1 - sum(linear.values.numel() for linear in linears) / num_weights if linears else 0.0
        # Dense products are faster for batches of many tokens, and give the same score.
        model = to_device(densify(model), dist.device())
        parts = (job.progress_of_part(part, num_parts, stage.id) for part in itertools.count(index * (1 + len(texts))))
        score = task.score(model, processor, examples, spec, next(parts))
        metrics = score.metrics | {"num_left_out": num_left_out}
        for name, text in texts.items():
            metrics |= {f"{name}/{metric}": value for metric, value in text.score(model, next(parts)).items()}
        rows.append({"stage": stage.id, "loss": stage.model_name, "precision": spec.precision, "sparsity": sparsity,
                     "metrics": metrics})
        with open(job.out / f"{stage.id.replace('/', '-')}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(sample) + "\n" for sample in score.samples)
    write_json(job.out / "scores.json", rows)
    return {row["stage"]: row["metrics"] for row in rows}
