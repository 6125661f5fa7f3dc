"""One optimizer step: fetch, forward, loss, backward, update."""

import math
from dataclasses import dataclass

import torch

from sparse_train import dist
from sparse_train.models import family_of
from sparse_train.tasks import Batch
from sparse_train.tasks.batch import IGNORED
from sparse_train.training.bits import FrozenBits, digest_bits
from sparse_train.training.engine import build_student, step_engine
from sparse_train.training.features import FiniteCheck, Tap
from sparse_train.training.head import Head
from sparse_train.training.losses import Shares, new_terms, weighted_loss
from sparse_train.training.run import TrainingRun
from sparse_train.training.schedule import learning_rate
from sparse_train.training.sequence import parallelise_attention, split_batch, split_tokens
from sparse_train.training.teacher import Teacher, feature_points
from sparse_train.training.terms import ModelOutputs


@dataclass(frozen=True)
class MicroStep:
    shares: Shares
    """Without gradient."""
    num_tokens: torch.Tensor
    """Scalar int64: real tokens on this rank."""


@dataclass(frozen=True)
class StepResult:
    micro_steps: list[MicroStep]
    learning_rate: float
    gradient_norm: float
    """Of the whole gradient over all ranks, before clipping."""


class Trainer:
    """A student and its teacher under DeepSpeed. The result of step(n) depends on their state and on n alone."""

    def __init__(self, run: TrainingRun):
        """Collective. Changes `run.student` and `run.teacher`, which belong to the engines from here on."""
        self._run = run
        self._group = None
        if run.config.sequence_parallel > 1:
            self._group = dist.group_of_neighbours(run.config.sequence_parallel)
            parallelise_attention(run.student, self._group)
        if run.packed:
            for model in filter(None, (run.student, run.teacher)):
                family_of(model).separate_examples(model)
        terms = list(new_terms(run.loss).values())
        self._head = Head(run.student)
        # Taps come before DeepSpeed's own hooks, which wrap the outputs.
        blocks = family_of(run.student).blocks(run.student)
        self._finite = FiniteCheck(list(blocks))
        self._block_tap = Tap(list(blocks.values()))
        uses_features = any(term.uses_features for term in terms)
        self._feature_tap = Tap([point.module for point in feature_points(run.student, run.loss)]
                                if uses_features else [])
        digests = digest_bits(run.student)  # before the engine, which takes over rank 0's
        self.engine = build_student(run.student, run.config)
        self.bits = FrozenBits(run.student, digests)
        self._teacher = None
        if run.loss.needs_teacher:
            if run.teacher is None:
                raise ValueError("the loss needs a teacher, and the run has none")
            if self._group is not None:
                parallelise_attention(run.teacher, self._group)
            self._teacher = Teacher(run.teacher, run.config, run.teacher_config, run.loss, terms)
        self.engine.train()

    def step(self, step: int) -> StepResult:
        """Collective. Take optimizer step 1 ... config.steps.

        Raises FloatingPointError, on every rank, when the gradient is not finite.
        """
        run = self._run
        # Dropout, where a model has it, depends on the step alone: a resumed job draws what an unbroken one does.
        torch.manual_seed((run.seed * 1_000_003 + step) * dist.world_size() + dist.rank())
        self._finite.clear()
        rate = learning_rate(run.config, step)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate
        micro_steps, norm = [], math.nan
        for micro_step in range(run.config.accumulation):
            batch = run.fetch(run.order.indices(step - 1, micro_step)).to(dist.device())
            micro_steps.append(self._backward(batch))
            norm = step_engine(self.engine)
        if not math.isfinite(norm):
            raise FloatingPointError(f"step {step}: the gradient's norm is {norm}; {self._finite.first_bad()}. "
                                     "Lower the learning rate or use fp32; saved checkpoints predate this step")
        return StepResult(micro_steps, rate, norm)

    def _backward(self, batch: Batch) -> MicroStep:
        targets = batch.targets  # before the tokens are split: the next one may be another rank's
        if self._group is not None:
            batch, targets = split_batch(batch, self._group), split_tokens(targets, self._group, IGNORED)
        shares = self._forward(batch, targets)
        # DeepSpeed averages gradients over ranks; shares add up.
        self.engine.backward(shares.loss * dist.world_size())
        return MicroStep(shares.detached(), batch.attend.sum())

    def _forward(self, batch: Batch, targets: torch.Tensor) -> Shares:
        inputs = batch.inputs() | {"use_cache": False}
        is_read = targets != IGNORED
        if self._run.loss.logit_tokens == "labelled":
            is_read = is_read | (batch.labels != IGNORED)
        positions = is_read.flatten().nonzero().squeeze(1)
        features: dict[int, torch.Tensor] = {}
        with self._block_tap.visiting(self._finite.watch), self._feature_tap.visiting(features.__setitem__):
            logits = self._head.logits(self.engine, inputs, positions)
        terms = new_terms(self._run.loss)
        taught = torch.empty(0)
        if self._teacher is not None:
            taught = self._teacher.answer(inputs, batch, positions, terms.values(), features)
        labels = batch.labels.flatten()[positions]
        return weighted_loss(self._run.loss, terms, ModelOutputs(logits, targets.flatten()[positions], labels, taught))
