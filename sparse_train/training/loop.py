"""The training loop: step, log, save. Dense and sparse students run the same one.

A signal or a deadline that comes near stops it early: the ranks agree on that at the end of a step, save together and
return.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_train import dist
from sparse_train.stopping import StopMonitor
from sparse_train.training import checkpoint
from sparse_train.training.bits import FrozenBits
from sparse_train.training.metrics import Meter
from sparse_train.training.run import Hooks, TrainingRun
from sparse_train.training.step import Trainer


@dataclass(frozen=True)
class Outcome:
    engine: Any
    """DeepSpeed's, with the trained model."""
    bits: FrozenBits
    finished: bool
    """False when a signal or the deadline ended the training early; run it again to go on from its checkpoint."""
    metrics: dict[str, Any]
    """The last logged line."""


def train(run: TrainingRun, folder: Path, hooks: Hooks | None = None) -> Outcome:
    """Train `run.student` for config.steps optimizer steps, from the newest checkpoint below `folder` if there is one.

    Collective. With a deadline the state is saved in time for it, judged by how long steps and saves have taken; where
    no save has been measured, the first step is saved to measure one. Raises FloatingPointError, on every rank and in
    the step where it happens, when a gradient is not finite.
    """
    hooks, config = hooks or Hooks(), run.config
    trainer, meter = Trainer(run), Meter()
    last_step, metrics = checkpoint.resume(trainer.engine, trainer.bits, folder)
    if hooks.tracker:
        hooks.tracker.rewind(last_step)
    save_s = checkpoint.save_seconds(folder) if hooks.deadline_s is not None else None
    measures_save = dist.any_rank(hooks.deadline_s is not None and save_s is None)
    calibration_step = last_step + 1 if measures_save else None
    with StopMonitor(hooks.deadline_s, save_s) as monitor:
        for step in range(last_step + 1, config.steps + 1):
            meter.add(trainer.step(step))
            stopping = dist.any_rank(monitor.end_step())
            if step % config.log_every == 0 or step == config.steps or stopping:
                metrics = meter.report()
                if hooks.tracker:
                    hooks.tracker.log(step, metrics)
                if hooks.progress:
                    hooks.progress(step, config.steps, f"loss {metrics['loss']:.3f}")
            # The last step too: gathering and writing the model may take longer than the time that is left.
            if stopping or step in (calibration_step, config.steps) or step % config.checkpoint_every == 0:
                with monitor.saving():
                    checkpoint.save(trainer.engine, trainer.bits, folder, step, metrics, config.checkpoints_kept,
                                    hooks.require_newest_attempt)
            if stopping:
                return Outcome(trainer.engine, trainer.bits, finished=False, metrics=metrics)
    trainer.bits.check()
    return Outcome(trainer.engine, trainer.bits, finished=True, metrics=metrics)
