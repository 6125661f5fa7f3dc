"""`finetune.losses.NAME`: the weighted terms of a loss and how they are normalised (sparse_train/training)."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from sparse_train.config.base import Section, Weight

_PRESETS: dict[str, dict[str, Any]] = {
    "paper-mpt": {"feature_weight": 1.0, "normalise": "micro_batch", "epsilon": 2.0**-7, "final_feature": "norm",
                  "logit_tokens": "labelled"},
    "paper-t5": {"feature_weight": 1.0, "normalise": "micro_batch", "epsilon": 1e-9, "epsilon_per": "position"},
    "paper-whisper": {"task_weight": 0.5, "feature_weight": 1.0, "normalise": "micro_batch", "epsilon": 1e-8,
                      "epsilon_per": "position", "layers": tuple(range(10)), "encoder_padding": True},
    "sparseml": {"feature_weight": 1.0, "normalise": "micro_batch"},
}


class LossConfig(Section):
    """total = task_weight * CE + logit_weight * KL(teacher || student) * T^2 + feature_weight * SquareHead."""

    preset: Literal["paper-mpt", "paper-t5", "paper-whisper", "sparseml"] | None = None
    """Start from the formulas of that code; keys given beside it win."""
    task_weight: Weight = 1.0
    logit_weight: Weight = 0.0
    feature_weight: Weight = 0.0
    temperature: Annotated[float, Field(gt=0)] = 1.0
    normalise: Literal["global", "micro_batch"] = "global"
    """What a ratio is formed over: all ranks of the micro-step, or each rank's micro-batch with a mean over ranks."""
    epsilon: Weight = 0.0
    """Added to the teacher's mean square in SquareHead's denominator."""
    epsilon_per: Literal["token", "position"] = "token"
    """That mean is over real tokens, or over all positions, padding counted as zeros."""
    final_feature: Literal["block", "norm"] = "block"
    """The last feature: the last block's output, or the final norm's."""
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Blocks of each stack whose outputs are compared; None takes all."""
    encoder_padding: bool = False
    """Count an encoder's padding as tokens in SquareHead."""
    logit_tokens: Literal["predicted", "labelled"] = "predicted"
    """KL at the positions that predict a target, or at the targets' own positions (off by one in a decoder)."""

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, given):
        chosen = given.get("preset") if isinstance(given, dict) else None
        return {**_PRESETS.get(chosen, {}), **given} if chosen else given

    @model_validator(mode="after")
    def _something_to_learn(self):
        if self.task_weight == self.logit_weight == self.feature_weight == 0:
            raise ValueError("all loss weights are 0; give task_weight, logit_weight or feature_weight")
        if self.layers == ():
            raise ValueError("layers is empty; name blocks, or leave it out for all of them")
        return self

    @property
    def needs_teacher(self) -> bool:
        return self.logit_weight > 0 or self.feature_weight > 0
