"""finetune/LOSS: the pruned student trains its kept values; the dense teacher runs where the loss needs it."""

import logging
import math
from collections import deque
from collections.abc import Sequence
from fractions import Fraction
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
from sparse_train.tasks import Batch, Task, build_task, training_examples
from sparse_train.tasks.packing import Windows, collate_windows
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
from sparse_train.training.order import Mix, Order

log = logging.getLogger(__name__)


def run(job: Job) -> dict[str, Any]:
    config, loss = job.config.finetune, job.stage.loss_config(job.config)
    student = load_student(job.path_of(Kind.PRUNE), config)
    teacher = load_teacher(job.path_of(Kind.DENSE), config, config.teacher) if loss.needs_teacher else None
    processor = load_processor(job.path_of(Kind.PRUNE), job.config.task.language)
    data = TrainingData(job, config, processor)
    return fine_tune(job, data, processor, TrainingRun(
        student, data.batch, data.order, config, seed=job.config.seed, packed=data.packed, loss=loss, teacher=teacher,
        teacher_config=config.teacher))


class TrainingData:
    """The training examples of the run's task, or windows of them, and the order in which a training sees them."""

    def __init__(self, job: Job, config: TrainConfig, processor: Processor):
        task, seed = job.config.task, job.config.seed
        self._task, self._processor, self.packed, self.num_left_out = build_task(task), processor, task.pack, 0
        self._window = min(task.max_length, processor.positions or task.max_length)
        self._rows, num_rows = self._read(self._task, config.num_examples, seed)
        self.num_mixed, mix = 0, None
        """Rows of task.mix that the whole training reads."""
        if task.mix:
            self._mixed, num_mixed = self._read(build_task(task.mix.task), None, seed)
            mix = Mix(Fraction(str(task.mix.share)), num_mixed)
            self.num_mixed = mix.num_read(config.steps * config.batch_size)
            log.info("%d of the %d %s of the training are of task.mix (%s)", self.num_mixed,
                     config.steps * config.batch_size, "windows" if task.pack else "examples", task.mix.task.name)
        self.order = Order(num_rows, config.batch_size, config.accumulation, seed, config.sequence_parallel, mix)

    def batch(self, indices: list[int]) -> Batch:
        rows = [self._mixed[~index] if index < 0 else self._rows[index] for index in indices]
        return collate_windows(rows, self._processor) if self.packed else self._task.batch(rows, self._processor)

    def _read(self, task: Task, num_examples: int | None, seed: int) -> tuple[Sequence[Any], int | None]:
        """(examples or windows, how many there are; None where they never end)."""
        rows: Sequence[Any]
        rows, num_left_out = training_examples(task, self._processor, num_examples)
        self.num_left_out += num_left_out
        if self.packed:
            rows = Windows(examples := rows, self._processor, self._window, seed)
            log.info("%d examples of task %s in %d windows of %d tokens, %.0f%% of them filled", len(examples),
                     task.config.name, len(rows), self._window, 100 * rows.filled)
        return rows, None if task.endless and num_examples is None else len(rows)


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
        "loss": outcome.metrics["loss"], "num_examples_left_out": data.num_left_out, "num_mixed": data.num_mixed,
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
