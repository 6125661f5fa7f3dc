"""The training loop: fetch, loss, backward, step, log, save. Dense and sparse students run the same one.

A stop signal sets a flag; the ranks agree on it at a logged step, save together and return unfinished.
"""

import math
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_train import dist
from sparse_train.config import LossConfig, TrainConfig
from sparse_train.tasks import Batch
from sparse_train.tracking import Tracker
from sparse_train.training import checkpoint
from sparse_train.training.engine import FeatureTap, build_engines, step_engine
from sparse_train.training.losses import Shares, distillation_loss
from sparse_train.training.order import Order

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Outcome:
    engine: Any
    finished: bool
    """False when a stop signal ended the job early; run it again to go on from its checkpoint."""
    metrics: dict[str, Any]
    """The last logged line."""


def train(student: nn.Module, teacher: nn.Module | None, fetch: Callable[[list[int]], Batch], order: Order,
          config: TrainConfig, loss: LossConfig, folder: Path, tracker: Tracker | None = None,
          progress: Progress | None = None, seed: int = 0) -> Outcome:
    """Train `student` for config.steps optimizer steps, from the newest checkpoint below `folder` if there is one.

    `fetch` turns this rank's example indices into a batch (an empty list into a row of padding). `tracker` and
    `progress` are rank 0's. Raises FloatingPointError, on every rank, when a logged loss or gradient is not finite.
    """
    trainer = _Trainer(student, teacher, fetch, order, config, loss, seed)
    start = checkpoint.resume(trainer.engine, folder)
    if tracker:
        tracker.rewind(start)
    metrics: dict[str, Any] = {}
    with _StopSignal() as stop:
        for step in range(start + 1, config.steps + 1):
            trainer.step(step)
            stopping = False
            if step % config.log_every == 0 or step == config.steps:
                metrics, stopping = trainer.metrics(step, stop.requested)
                if tracker:
                    tracker.log(step, metrics)
                if progress:
                    progress(step, config.steps, f"loss {metrics['loss']:.3f}")
            if step < config.steps and (stopping or step % config.checkpoint_every == 0):
                checkpoint.save(trainer.engine, folder, step)
            if stopping and step < config.steps:
                return Outcome(trainer.engine, finished=False, metrics=metrics)
    return Outcome(trainer.engine, finished=True, metrics=metrics)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of step 1..config.steps: linear warm-up to config.learning_rate, then linear decay to 0 after the last step."""
    warm = step / config.warmup_steps if config.warmup_steps else 1.0
    left = (config.steps - step + 1) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * min(1.0, warm, left)


class _Trainer:
    """Engines, taps and running sums of one job; step() advances, metrics() reports since the last report."""

    def __init__(self, student, teacher, fetch, order, config, loss, seed):
        self._config, self._loss, self._fetch, self._order, self._seed = config, loss, fetch, order, seed
        wants_features = loss.feature_weight > 0
        # Taps come before DeepSpeed's own hooks, which wrap the outputs.
        self._student_tap = FeatureTap(student) if wants_features else None
        self._teacher_tap = FeatureTap(teacher) if wants_features else None
        self.engine, self._teacher = build_engines(student, teacher if loss.needs_teacher else None, config)
        self.engine.train()
        self._norm: torch.Tensor | float | None = None
        self._reset()

    def _reset(self):
        self._terms, self._num_tokens, self._num_micro_steps, self._since = 0, 0, 0, time.perf_counter()

    def step(self, step: int) -> None:
        # Dropout, where a model has it, depends on the step alone: a resumed job draws what an unbroken one does.
        torch.manual_seed((self._seed * 1_000_003 + step) * dist.world_size() + dist.rank())
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate(self._config, step)
        for micro_step in range(self._config.accumulation):
            batch = self._fetch(self._order.indices(step - 1, micro_step)).to(dist.device())
            shares = self._shares(batch)
            # DeepSpeed averages gradients over ranks; shares add up.
            self.engine.backward(shares.loss * dist.world_size())
            self._norm = step_engine(self.engine)
            self._terms = self._terms + shares.detached()
            self._num_tokens = self._num_tokens + batch.attend.sum()
            self._num_micro_steps += 1

    def _shares(self, batch: Batch) -> Shares:
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attend.long(), "use_cache": False}
        teacher_logits, taught = None, []
        if self._teacher is not None:
            with torch.no_grad():
                teacher_logits, taught = _run(self._teacher, self._teacher_tap, inputs)
        logits, learnt = _run(self.engine, self._student_tap, inputs)
        return distillation_loss(self._loss, logits, batch.labels, batch.attend, learnt, taught, teacher_logits)

    def metrics(self, step: int, stop_requested: bool) -> tuple[dict[str, Any], bool]:
        """Collective. Means since the last call, and whether any rank was asked to stop."""
        sums = torch.cat([self._terms.double(), self._num_tokens.double()[None],
                          torch.tensor([float(stop_requested)], dtype=torch.double, device=self._terms.device)])
        *terms, num_tokens, num_stops = dist.sum_over_ranks(sums).tolist()
        loss, task, logit, *feature = (term / self._num_micro_steps for term in terms)
        found = {"loss": loss, "task": task, "logit": logit, "feature": sum(feature),
                 "squarehead": {str(layer): term for layer, term in enumerate(feature)},
                 "learning_rate": learning_rate(self._config, step), "gradient_norm": float(self._norm),
                 "tokens_per_second": num_tokens / (time.perf_counter() - self._since)}
        for name in ("loss", "gradient_norm"):
            if not math.isfinite(found[name]):
                raise FloatingPointError(f"step {step}: {name} is {found[name]}; lower the learning rate or use fp32")
        self._reset()
        return found, num_stops > 0


def _run(model, tap: FeatureTap | None, inputs: dict) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(logits, block outputs or nothing)."""
    with tap or nullcontext():
        logits = model(**inputs).logits
    return logits, tap.take() if tap else []


class _StopSignal:
    """While open, SIGTERM only sets a flag: a save needs all ranks, and they agree on it at a step's end."""

    def __enter__(self):
        self.requested = False
        self._before = signal.signal(signal.SIGTERM, self._set)
        return self

    def _set(self, number, frame):
        self.requested = True

    def __exit__(self, *exception):
        signal.signal(signal.SIGTERM, self._before)
