"""`finetune.losses.NAME`: the weighted terms of a loss and how they are normalised (sparse_train/training)."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from sparse_train.config.base import Section, Weight
from sparse_train.registry import LOSS_TERMS

_PRESETS: dict[str, dict[str, Any]] = {
    "paper-mpt": {"feature_weight": 1.0, "normalise": "micro_batch", "epsilon": 2.0**-7, "features": "final_norm",
                  "logit_tokens": "labelled"},
    "paper-t5": {"feature_weight": 1.0, "normalise": "micro_batch", "epsilon": 1e-9, "epsilon_per": "position"},
    "paper-whisper": {"task_weight": 0.5, "feature_weight": 1.0, "normalise": "micro_batch", "epsilon": 1e-8,
                      "epsilon_per": "position", "layers": tuple(range(10)), "encoder_padding": True},
    "sparseml": {"feature_weight": 1.0, "normalise": "micro_batch"},
    "token": {"feature_weight": 0.562, "feature_ratio": "token"},
    "ast": {"task_weight": 0.33, "logit_weight": 0.67, "temperature": 2.0, "normalise": "micro_batch"},
}
METRICS = frozenset({"step", "loss", "squarehead", "num_tokens", "learning_rate", "gradient_norm", "tokens_per_second",
                     "nodes", "global_step"})
"""What a line of metrics holds beside the terms of the loss (sparse_train/training/metrics.py)."""


class LossConfig(Section):
    """total = task_weight * CE + logit_weight * D(teacher, student) * T^2 + feature_weight * SquareHead, and the
    terms that other packages add."""

    preset: Literal["paper-mpt", "paper-t5", "paper-whisper", "sparseml", "ast", "token"] | None = None
    """Start from the formulas of that code; keys given beside it win. token is our own: SquareHead with a ratio per
    token, which was ahead of the paper's on a pretrained model (docs/benchmarks.md)."""
    task_weight: Weight = 1.0
    logit_weight: Weight = 0.0
    feature_weight: Weight = 0.0
    terms: dict[str, Weight] = {}  # noqa: RUF012 - pydantic copies it
    """Weights of the terms of other packages (entry points of the group sparse_train.loss_terms), by name."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    normalise: Literal["global", "micro_batch"] = "global"
    """What a ratio is formed over: all ranks of the micro-step, or each rank's micro-batch with a mean over ranks."""
    epsilon: Weight = 0.0
    """Added to the teacher's mean square in SquareHead's denominator."""
    epsilon_per: Literal["token", "position"] = "token"
    """That mean is over real tokens, or over all positions, padding counted as zeros."""
    features: Literal["blocks", "final_norm", "norms"] = "blocks"
    """What SquareHead compares. blocks: the blocks' outputs. final_norm: the same, but the final norm's output in the
    place of the last block's. norms: each block's output as the next block's first norm leaves it, and the last one's
    as the final norm does."""
    feature_ratio: Literal["block", "token", "typical", "channel"] = "block"
    """What SquareHead's ratio of squared error to the teacher's energy is formed over. block: all tokens and channels
    of a block, as in the paper. typical: all but the tokens whose norm is over 10 times the geometric mean of the
    block's. token: each token, then the mean over tokens. channel: each channel, then the mean over channels."""
    layers: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Blocks of each stack whose outputs are compared; None takes all."""
    encoder_padding: bool = False
    """Count an encoder's padding as tokens in SquareHead."""
    logit_beta: Annotated[float, Field(ge=0, le=1)] = 0.0
    """D: 0 is KL(teacher || student), 1 is KL(student || teacher), and what is between them the generalised
    Jensen-Shannon divergence of arXiv 2306.13649 as it is there, so that D is small near 0 and near 1."""
    logit_tokens: Literal["predicted", "labelled"] = "predicted"
    """D at the positions that predict a target, or at the targets' own positions (off by one in a decoder)."""

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {**_PRESETS.get(str(data.get("preset")), {}), **cls.in_present_names(data)}

    @classmethod
    def in_present_names(cls, data: dict[str, Any]) -> dict[str, Any]:
        if "final_feature" not in data:
            return data
        former = str(data["final_feature"])
        present = {"features": {"block": "blocks", "norm": "final_norm"}.get(former, former)} | data
        return {key: value for key, value in present.items() if key != "final_feature"}

    @model_validator(mode="after")
    def _something_to_learn(self) -> Self:
        if not any(self.weights.values()):
            raise ValueError("all loss weights are 0; give task_weight, logit_weight or feature_weight")
        if self.layers == ():
            raise ValueError("layers is empty; name blocks, or leave it out for all of them")
        return self

    @field_validator("terms")
    @classmethod
    def _terms_exist(cls, terms: dict[str, float]) -> dict[str, float]:
        for name in terms:
            LOSS_TERMS.check(name)
            if f"{name}_weight" in cls.model_fields:
                raise ValueError(f"terms is for the terms of other packages; give {name}_weight")
            if name in METRICS or name in cls.model_fields:
                raise ValueError(f"terms.{name} is called like {'a metric' if name in METRICS else 'a key'} of every "
                                 "loss; rename the entry point in the package that adds it")
        return terms

    @property
    def weights(self) -> dict[str, float]:
        """By the names of sparse_train.registry.LOSS_TERMS: our own terms, then others whose weight is not 0."""
        return {"task": self.task_weight, "logit": self.logit_weight, "feature": self.feature_weight,
                **{name: weight for name, weight in self.terms.items() if weight}}

    @property
    def needs_teacher(self) -> bool:
        return any(weight and LOSS_TERMS.entries[name].needs_teacher for name, weight in self.weights.items())
