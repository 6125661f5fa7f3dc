"""The training loop: fetch, loss, backward, step, log, save. Dense and sparse students run the same one.

A stop signal sets a flag, and so does a deadline that comes near; the ranks agree on it at the end of a step, save
together and return unfinished.
"""

import contextlib
import inspect
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from sparse_train import dist
from sparse_train.config import LossConfig, TeacherConfig, TrainConfig
from sparse_train.models import family_of
from sparse_train.tasks import Batch
from sparse_train.tracking import Tracker
from sparse_train.training import checkpoint
from sparse_train.training.engine import FrozenBits, build_student, build_teacher, step_engine
from sparse_train.training.features import FiniteCheck, Tap
from sparse_train.training.losses import FeatureSums, Shares, distillation_loss
from sparse_train.training.order import Order
from sparse_train.training.sequence import parallelise_attention, split_tokens

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Outcome:
    engine: Any
    bits: FrozenBits
    finished: bool
    """False when a stop signal ended the job early; run it again to go on from its checkpoint."""
    metrics: dict[str, Any]
    """The last logged line."""


def train(student: nn.Module, teacher: nn.Module | None, fetch: Callable[[list[int]], Batch], order: Order,
          config: TrainConfig, loss: LossConfig, folder: Path, tracker: Tracker | None = None,
          progress: Progress | None = None, seed: int = 0, teacher_config: TeacherConfig | None = None,
          deadline: float | None = None, guard: Callable[[], None] = lambda: None) -> Outcome:
    """Train `student` for config.steps optimizer steps, from the newest checkpoint below `folder` if there is one.

    `fetch` turns this rank's example indices into a batch (an empty list into a row of padding). `tracker` and
    `progress` are rank 0's, and so is `deadline`, when the process will be ended (seconds since the epoch): the state
    is saved in time for it, judged by what steps and saves have taken so far; where no save has been measured, the
    first step is saved to know. `guard` is checkpoint.save's. Raises FloatingPointError, on every rank and in the step
    where it happens, when a gradient is not finite.
    """
    trainer = Trainer(student, teacher, fetch, order, config, loss, seed, teacher_config or TeacherConfig())
    start, metrics = checkpoint.resume(trainer.engine, trainer.bits, folder)
    if tracker:
        tracker.rewind(start)
    save_s = checkpoint.save_seconds(folder) if deadline else None
    early = start + 1 if dist.any_rank(deadline is not None and save_s is None) else None
    with _Stop(deadline, save_s) as stop:
        for step in range(start + 1, config.steps + 1):
            trainer.step(step)
            stopping = dist.any_rank(stop.requested())
            if step % config.log_every == 0 or step == config.steps or stopping:
                metrics = trainer.metrics(step)
                if tracker:
                    tracker.log(step, metrics)
                if progress:
                    progress(step, config.steps, f"loss {metrics['loss']:.3f}")
            # The last step too: to gather and write the model may take longer than what is left, and be cut off.
            if stopping or step in (early, config.steps) or step % config.checkpoint_every == 0:
                with stop.saving():
                    checkpoint.save(trainer.engine, trainer.bits, folder, step, metrics, config.checkpoints_kept, guard)
            if stopping:
                return Outcome(trainer.engine, trainer.bits, finished=False, metrics=metrics)
    trainer.bits.check()
    return Outcome(trainer.engine, trainer.bits, finished=True, metrics=metrics)


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of step 1..config.steps: linear warm-up to config.learning_rate, then linear decay to 0 after the last step."""
    warm = step / config.warmup_steps if config.warmup_steps else 1.0
    left = (config.steps - step + 1) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * min(1.0, warm, left)


class Trainer:
    """Engines, taps and running sums of one job; step() advances, metrics() reports since the last report."""

    def __init__(self, student, teacher, fetch, order, config: TrainConfig, loss: LossConfig, seed: int,
                 teacher_config: TeacherConfig):
        self._config, self._loss, self._fetch, self._order, self._seed = config, loss, fetch, order, seed
        self._learnt: dict[int, torch.Tensor] = {}
        self._features, self._attends = None, []
        self._group = None
        if config.sequence_parallel > 1:
            self._group = dist.group_of_neighbours(config.sequence_parallel)
            for model in (student, teacher) if loss.needs_teacher else (student,):
                parallelise_attention(model, self._group)
        # Taps come before DeepSpeed's own hooks, which wrap the outputs.
        blocks = family_of(student).blocks(student)
        self._finite = FiniteCheck(list(blocks))
        self._taps = [Tap(list(blocks.values()), self._finite.watch)]
        self._teacher, self._teacher_tap = None, None
        if loss.feature_weight:
            points = self._feature_points(student)
            self._taps.append(Tap([point.module for point in points], self._learnt.__setitem__))
            self._teacher_tap = Tap([point.module for point in self._feature_points(teacher)], self._compare)
            self._sides = [point.side for point in points]
        self.bits = FrozenBits(student)
        self.engine = build_student(student, config)
        self.bits.settle()
        if loss.needs_teacher:
            # Without a logit loss the head works on one token, as little as the model allows.
            self._unused_head = {"logits_to_keep": 1} if not loss.logit_weight and (
                "logits_to_keep" in inspect.signature(teacher.forward).parameters) else {}
            self._teacher = build_teacher(teacher, config, teacher_config)
        self.engine.train()
        self._norm: torch.Tensor | float | None = None
        self._reset()

    def _feature_points(self, model):
        points = family_of(model).feature_points(model, self._loss.final_feature)
        return [point for point in points if self._loss.layers is None or point.block in self._loss.layers]

    def _reset(self):
        self._terms, self._num_tokens, self._num_micro_steps, self._since = 0, 0, 0, time.perf_counter()

    def step(self, step: int) -> None:
        # Dropout, where a model has it, depends on the step alone: a resumed job draws what an unbroken one does.
        torch.manual_seed((self._seed * 1_000_003 + step) * dist.world_size() + dist.rank())
        self._finite.clear()
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate(self._config, step)
        for micro_step in range(self._config.accumulation):
            batch = self._fetch(self._order.indices(step - 1, micro_step)).to(dist.device())
            targets = batch.targets  # before the tokens are split: the next one may be another rank's
            if self._group is not None:
                batch = Batch(*(split_tokens(tensor, self._group, fill) for tensor, fill in (
                    (batch.input_ids, 0), (batch.attend, False), (batch.labels, -100))))
                targets = split_tokens(targets, self._group, -100)
            shares = self._shares(batch, targets)
            # DeepSpeed averages gradients over ranks; shares add up.
            self.engine.backward(shares.loss * dist.world_size())
            self._norm = step_engine(self.engine)
            self._terms = self._terms + shares.detached()
            self._num_tokens = self._num_tokens + batch.attend.sum()
            self._num_micro_steps += 1
        # The one number per step that the host waits for: the norm is the same on all ranks.
        self._norm = float(self._norm)
        if not math.isfinite(self._norm):
            raise FloatingPointError(f"step {step}: the gradient's norm is {self._norm}; {self._finite.first_bad()}. "
                                     "Lower the learning rate or use fp32; the checkpoints are from before")

    def _shares(self, batch: Batch, targets: torch.Tensor) -> Shares:
        inputs = batch.inputs() | {"use_cache": False}
        with contextlib.ExitStack() as open_taps:
            for tap in self._taps:
                open_taps.enter_context(tap)
            logits = self.engine(**inputs).logits
        teacher_logits, self._features = None, None
        if self._teacher is not None:
            teacher_logits = self._teach(inputs, batch)
        return distillation_loss(self._loss, logits, targets, self._features, teacher_logits, batch.labels)

    def _teach(self, inputs: dict, batch: Batch) -> torch.Tensor:
        """The teacher's logits where the loss wants them; its features are compared as they come and let go."""
        with torch.no_grad():
            if self._teacher_tap is None:
                return self._teacher(**inputs).logits
            attends = batch.attends
            if self._loss.encoder_padding and "encoder" in attends:
                attends["encoder"] = torch.ones_like(attends["encoder"])
            self._features, self._attends = FeatureSums(self._loss), [attends[side] for side in self._sides]
            with self._teacher_tap:
                return self._teacher(**inputs, **self._unused_head).logits

    def _compare(self, index: int, taught: torch.Tensor) -> None:
        with torch.enable_grad():
            self._features.add(self._learnt.pop(index), taught, self._attends[index])

    def metrics(self, step: int) -> dict[str, Any]:
        """Collective. Means since the last call."""
        node, num_nodes = dist.node()
        use = torch.zeros(num_nodes, len(_USE), dtype=torch.double, device=self._terms.device)
        use[node] = torch.tensor(_use_of_node(self._terms.device))
        summed = dist.sum_over_ranks(torch.cat([use.flatten(), self._terms.double(), self._num_tokens.double()[None]]))
        use = summed[:use.numel()].view_as(use).tolist()
        *terms, num_tokens = summed[num_nodes * len(_USE):].tolist()
        loss, task, logit, *feature = (term / self._num_micro_steps for term in terms)
        found = {"loss": loss, "task": task, "logit": logit, "feature": sum(feature),
                 "squarehead": {str(layer): term for layer, term in enumerate(feature)},
                 "learning_rate": learning_rate(self._config, step), "gradient_norm": self._norm,
                 "tokens_per_second": num_tokens / (time.perf_counter() - self._since),
                 "nodes": {str(index): dict(zip(_USE, row, strict=True)) for index, row in enumerate(use)}}
        self._reset()
        return found


_USE = ("memory_gb", "gpu_memory_gb", "gpu_percent")


def _use_of_node(device: torch.device) -> list[float]:
    """This rank's part of what its node uses, for a sum over the ranks: resident memory, device memory, mean load."""
    memory = psutil.Process().memory_info().rss / 1e9
    if device.type != "cuda":
        return [memory, 0.0, 0.0]
    try:
        load = torch.cuda.utilization(device) / dist.local_size()
    except Exception:  # the driver's library is missing or will not tell; not worth a training
        load = 0.0
    return [memory, torch.cuda.memory_reserved(device) / 1e9, load]


class _Stop:
    """While open, SIGTERM and SIGUSR2 (SLURM's warning) only set a flag: a save needs all ranks, and they agree on it
    at a step's end. A SIGTERM after that leaves at once; SLURM's warning may well follow a preemption's SIGTERM, and
    asks for the same."""

    _SAME_EVENT_S = 2.0
    """A batch system may send both signals, or one to a process and its group, for one reason."""

    def __init__(self, deadline: float | None, save_s: float | None = None):
        self._deadline, self._signalled = deadline, None
        self._asked, self._pause_s = time.monotonic(), 0.0
        self._save_s = 10.0 if save_s is None else save_s  # a guess until one is measured

    def __enter__(self):
        self._before = {number: signal.signal(number, self._set) for number in (signal.SIGTERM, signal.SIGUSR2)}
        return self

    def _set(self, number, frame):
        if number == signal.SIGTERM and self._signalled and time.monotonic() - self._signalled > self._SAME_EVENT_S:
            os._exit(128 + number)
        self._signalled = self._signalled or time.monotonic()

    def requested(self) -> bool:
        """To be asked at every step: one more of them must fit before the deadline."""
        now = time.monotonic()
        # The first pause has the compilation of everything in it, and none is known before it.
        self._pause_s, self._asked = max(now - self._asked, 0.5 * self._pause_s), now
        if self._signalled is not None:
            return True
        return self._deadline is not None and time.time() + 1.5 * (self._pause_s + self._save_s) > self._deadline

    @contextlib.contextmanager
    def saving(self):
        started = time.monotonic()
        yield
        self._save_s = time.monotonic() - started
        self._asked = time.monotonic()

    def __exit__(self, *exception):
        for number, handler in self._before.items():
            signal.signal(number, handler)
