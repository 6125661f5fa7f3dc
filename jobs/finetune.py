"""finetune/LOSS: the pruned student trains its kept values; the dense teacher answers when the loss asks for it."""

import math
from collections import deque
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from sparse_train import dist
from sparse_train.config import LossConfig, TeacherConfig, TrainConfig
from sparse_train.jobs.job import Job, Stopped
from sparse_train.jobs.stage import Kind
from sparse_train.models import Processor, load_processor, own_tensors, save_model
from sparse_train.sparse import sparse_linears
from sparse_train.tasks import build_task, training_examples
from sparse_train.tracking import Tracker
from sparse_train.training import audit, gathered_tensors, load_student, load_teacher, train
from sparse_train.training.order import Order


def run(job: Job) -> dict[str, Any]:
    loss = job.stage.loss_config(job.config)
    config = job.config.finetune
    student = load_student(job.path_of(Kind.PRUNE), config)
    teacher = load_teacher(job.path_of(Kind.DENSE), config, config.teacher) if loss.needs_teacher else None
    processor = load_processor(job.path_of(Kind.PRUNE), job.config.task.language)
    return fine_tune(job, student, teacher, processor, config, loss, config.teacher)


def fine_tune(job: Job, student: PreTrainedModel, teacher: nn.Module | None, processor: Processor,
              config: TrainConfig, loss: LossConfig, teacher_config: TeacherConfig | None = None) -> dict[str, Any]:
    """Train `student` on the task and write it to job.out, with metrics.jsonl. Collective; raises Stopped."""
    run = job.config
    task = build_task(run.task)
    examples, num_left_out = training_examples(task, processor, config.num_examples)
    tracker = None
    if dist.rank() == 0:
        tracker = Tracker(job.out, run.path, job.stage.id, job.stage.kind,
                          {**run.model_dump(mode="json"), "sparsity_of_layer": _sparsity_of_layers(student)},
                          run.tracking.wandb)
    outcome = train(
        student, teacher, lambda indices: task.batch([examples[i] for i in indices], processor),
        Order(None if task.endless and config.num_examples is None else len(examples), config.batch_size,
              config.accumulation, run.seed, config.sequence_parallel),
        config, loss, job.out / "checkpoints", tracker, job.progress if dist.rank() == 0 else None, run.seed,
        teacher_config, job.deadline, job.guard)
    if tracker:
        tracker.close()
    if not outcome.finished:
        dist.barrier()  # the first rank that leaves takes its step along, and rank 0 may still be telling wandb
        raise Stopped
    tensors = gathered_tensors(outcome.engine)
    if dist.rank() == 0:
        save_model(job.out, student, processor, tensors)
        audit(job.out, outcome.bits.digests)
    else:
        deque(tensors, maxlen=0)  # every rank takes part in gathering
    sizes = {name: _size(tensor) for name, tensor in own_tensors(student).items()}
    linears = sparse_linears(student).values()
    return {
        "loss": outcome.metrics["loss"], "num_examples_left_out": num_left_out,
        "num_parameters": sum(size for name, size in sizes.items() if not name.endswith(".bitmask")),
        "num_prunable": sum(linear.in_features * linear.out_features for linear in linears),
    }


def _sparsity_of_layers(model: nn.Module) -> dict[str, float]:
    return {name: 1 - _size(linear.values) / (linear.in_features * linear.out_features)
            for name, linear in sparse_linears(model).items()}


def _size(tensor) -> int:
    """Entries of a tensor, partitioned or not."""
    return math.prod(getattr(tensor, "ds_shape", tensor.shape))
