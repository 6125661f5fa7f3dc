"""finetune/LOSS: the pruned student trains its kept values; the dense teacher answers when the loss asks for it."""

from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from jobs.job import Job, Stopped
from sparse_train import dist
from sparse_train.config import LossConfig, TrainConfig
from sparse_train.models import load_model, load_tokenizer, save_model
from sparse_train.sparse import sparse_linears
from sparse_train.tasks import build_task, training_examples
from sparse_train.tracking import Tracker
from sparse_train.training import gathered_tensors, train
from sparse_train.training.order import Order


def run(job: Job) -> dict[str, Any]:
    loss = job.config.finetune.losses[job.loss]
    student = load_model(job.inputs["prune"])
    teacher = load_model(job.inputs["dense"]) if loss.needs_teacher else None
    return fine_tune(job, student, teacher, load_tokenizer(job.inputs["prune"]), job.config.finetune, loss)


def fine_tune(job: Job, student: PreTrainedModel, teacher: nn.Module | None, tokenizer: PreTrainedTokenizerBase,
              config: TrainConfig, loss: LossConfig) -> dict[str, Any]:
    """Train `student` on the task and write it to job.out, with metrics.jsonl. Collective; raises Stopped."""
    run = job.config
    task = build_task(run.task)
    examples, num_left_out = training_examples(task, tokenizer, config.num_examples)
    tracker = None
    if dist.rank() == 0:
        tracker = Tracker(job.out, f"{run.name}-{job.out.stem}", run.model_dump(mode="json"), run.tracking.wandb)
    outcome = train(
        student, teacher, lambda indices: task.batch([examples[i] for i in indices], tokenizer),
        Order(None if task.endless and config.num_examples is None else len(examples), config.batch_size,
              config.accumulation, run.seed),
        config, loss, job.out / "checkpoints", tracker, job.progress if dist.rank() == 0 else None, run.seed)
    if tracker:
        tracker.close()
    if not outcome.finished:
        raise Stopped
    tensors = dict(gathered_tensors(outcome.engine))
    if dist.rank() == 0:
        save_model(job.out, student, tokenizer, tensors)
    linears = sparse_linears(student).values()
    return {
        "loss": outcome.metrics["loss"], "num_examples_left_out": num_left_out,
        "num_parameters": sum(t.numel() for n, t in tensors.items() if not n.endswith(".bitmask")),
        "num_prunable": sum(linear.in_features * linear.out_features for linear in linears),
    }
