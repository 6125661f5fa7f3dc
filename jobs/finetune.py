"""finetune/LOSS: the pruned student trains its kept values; the dense teacher runs where the loss needs it."""

import math
from collections import deque
from typing import Any

import torch
from torch import nn

from sparse_train import dist
from sparse_train.compat.deepspeed import full_shape
from sparse_train.config import TrainConfig
from sparse_train.jobs.job import Job, Stopped
from sparse_train.jobs.stage import Kind
from sparse_train.models import Processor, load_processor, own_tensors, save_model
from sparse_train.sparse import sparse_linears
from sparse_train.tasks import Batch, build_task, training_examples
from sparse_train.tracking import Tracker
from sparse_train.training import (
    Hooks,
    Outcome,
    TrainingRun,
    audit,
    gathered_tensors,
    load_student,
    load_teacher,
    train,
)
from sparse_train.training.order import Order


def run(job: Job) -> dict[str, Any]:
    config, loss = job.config.finetune, job.stage.loss_config(job.config)
    student = load_student(job.path_of(Kind.PRUNE), config)
    teacher = load_teacher(job.path_of(Kind.DENSE), config, config.teacher) if loss.needs_teacher else None
    processor = load_processor(job.path_of(Kind.PRUNE), job.config.task.language)
    data = TrainingData(job, config, processor)
    return fine_tune(job, data, processor, TrainingRun(
        student, data.batch, data.order, config, seed=job.config.seed, loss=loss, teacher=teacher,
        teacher_config=config.teacher))


class TrainingData:
    """The examples of the run's task, and the order in which a training sees them."""

    def __init__(self, job: Job, config: TrainConfig, processor: Processor):
        self._task, self._processor = build_task(job.config.task), processor
        self._examples, self.num_left_out = training_examples(self._task, processor, config.num_examples)
        endless = self._task.endless and config.num_examples is None
        self.order = Order(None if endless else len(self._examples), config.batch_size, config.accumulation,
                           job.config.seed, config.sequence_parallel)

    def batch(self, indices: list[int]) -> Batch:
        return self._task.batch([self._examples[index] for index in indices], self._processor)


def fine_tune(job: Job, data: TrainingData, processor: Processor, training: TrainingRun) -> dict[str, Any]:
    """Train on the task and write the model to job.out, with metrics.jsonl. Collective; raises Stopped."""
    student = training.student
    outcome = _train(job, training)
    tensors = gathered_tensors(outcome.engine)
    if dist.rank() == 0:
        save_model(job.out, student, processor, tensors)
        audit(job.out, outcome.bits.digests)
    else:
        deque(tensors, maxlen=0)  # every rank takes part in gathering
    sizes = {name: _size(tensor) for name, tensor in own_tensors(student).items()}
    linears = sparse_linears(student).values()
    return {
        "loss": outcome.metrics["loss"], "num_examples_left_out": data.num_left_out,
        "num_parameters": sum(size for name, size in sizes.items() if not name.endswith(".bitmask")),
        "num_prunable": sum(linear.in_features * linear.out_features for linear in linears),
    }


def _train(job: Job, training: TrainingRun) -> Outcome:
    folder, tracker = job.out / "checkpoints", None
    if dist.rank() == 0:
        config = job.config.model_dump(mode="json") | {"sparsity_of_layer": _sparsity_of_layers(training.student)}
        tracker = Tracker(job.out, job.config.path, job.stage.id, job.stage.kind, config,
                          job.config.tracking.wandb)
    progress = job.progress if dist.rank() == 0 else None
    outcome = train(training, folder, Hooks(tracker, progress, job.deadline_s, job.require_newest_attempt))
    if tracker:
        tracker.close()
    if not outcome.finished:
        dist.barrier()  # the first rank to exit ends the job step, and rank 0 may still be writing to wandb
        raise Stopped
    return outcome


def _sparsity_of_layers(model: nn.Module) -> dict[str, float]:
    return {name: 1 - _size(linear.values) / (linear.in_features * linear.out_features)
            for name, linear in sparse_linears(model).items()}


def _size(tensor: torch.Tensor) -> int:
    """Entries of a tensor, partitioned or not."""
    return math.prod(full_shape(tensor))
