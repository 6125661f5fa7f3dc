"""The learning rate, a pure function of the step: a resumed training needs no state for it."""

from sparse_train.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Of step 1..config.steps: linear warm-up to config.learning_rate, then linear decay to 0 after the last step."""
    warm_up = step / config.warmup_steps if config.warmup_steps else 1.0
    decay = (config.steps - step + 1) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * min(1.0, warm_up, decay)
