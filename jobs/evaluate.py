"""evaluate: the task's score of the dense, the one-shot and every fine-tuned model, on the same examples; and what each
of them has kept of general text (evaluate.texts). The ranks share the batches, and each of them holds the models; or
they share the models (evaluate.placement=sharded), and each of them makes all batches with the others."""

import json
from typing import Any

from torch import nn

from sparse_train import dist
from sparse_train.artifacts import write_json
from sparse_train.compat.deepspeed import full_shape, release
from sparse_train.compat.transformers import to_device
from sparse_train.jobs.job import Job
from sparse_train.jobs.ledger import Ledger
from sparse_train.models import DTYPES, load_model, load_processor
from sparse_train.sparse import densify, sparse_linears
from sparse_train.stopping import StopMonitor
from sparse_train.tasks import build_task, scored_examples
from sparse_train.tasks.general_text import GeneralText
from sparse_train.training import load_sharded


def run(job: Job) -> dict[str, Any]:
    with StopMonitor(job.deadline_s, save_s=0) as monitor:
        spec = job.config.evaluate
        return _score_all(job, Ledger(job, monitor, len(job.inputs) * (1 + len(spec.texts)),
                                      together=spec.placement == "sharded"))


def _score_all(job: Job, ledger: Ledger) -> dict[str, Any]:
    spec, task = job.config.evaluate, build_task(job.config.task)
    processor = load_processor(job.inputs[0].path, job.config.task.language)  # all inputs have the same
    examples, num_left_out = scored_examples(task, processor, spec)
    texts = {name: GeneralText(text, processor, spec) for name, text in spec.texts.items()}
    rows: list[dict[str, Any]] = []
    for source in job.inputs:
        stage = source.stage
        if spec.placement == "sharded":
            model = load_sharded(source.path, spec.precision)
        else:
            model = to_device(load_model(source.path, DTYPES[spec.precision]), dist.device())
        sparsity = _sparsity(model)
        if spec.placement == "replicated":  # dense products are faster for batches of many tokens
            model = densify(model)
        score = task.score(model, processor, examples, spec, ledger.part(stage.id))
        metrics = score.metrics | {"num_left_out": num_left_out}
        for name, text in texts.items():
            on_text = text.score(model, ledger.part(f"{stage.id} on {name}"))
            metrics |= {f"{name}/{metric}": value for metric, value in on_text.items()}
        rows.append({"stage": stage.id, "loss": stage.model_name, "precision": spec.precision, "sparsity": sparsity,
                     "metrics": metrics})
        if dist.rank() == 0:
            with open(job.out / f"{stage.id.replace('/', '-')}.jsonl", "w", encoding="utf-8") as file:
                file.writelines(json.dumps(sample) + "\n" for sample in score.samples)
        if spec.placement == "sharded" and (len(rows) > 1 or not texts):  # texts compare with the first one
            release(model)
        del model  # before the next one is loaded
    if dist.rank() == 0:
        write_json(job.out / "scores.json", rows)
    return {row["stage"]: row["metrics"] for row in rows}


def _sparsity(model: nn.Module) -> float:
    """Of its sparse linears together; 0 without any."""
    linears = sparse_linears(model).values()
    num_weights = sum(linear.in_features * linear.out_features for linear in linears)
    return 1 - sum(full_shape(linear.values).numel() for linear in linears) / num_weights if linears else 0.0
