"""The teacher in a training: its logits, and its features as they appear."""

from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

from sparse_train.config import LossConfig, TeacherConfig, TrainConfig
from sparse_train.models import family_of
from sparse_train.models.family import FeaturePoint
from sparse_train.tasks import Batch
from sparse_train.training.engine import build_teacher
from sparse_train.training.features import Tap
from sparse_train.training.head import Head
from sparse_train.training.terms import LossTerm


class Teacher:
    """Its engine, and the comparison of its features with the student's."""

    def __init__(self, model: PreTrainedModel, config: TrainConfig, teacher_config: TeacherConfig, loss: LossConfig,
                 terms: Iterable[LossTerm]):
        """`terms`: those of `loss`, for what they use."""
        terms = list(terms)
        self._counts_padding = loss.encoder_padding
        points = feature_points(model, loss) if any(term.uses_features for term in terms) else []
        self._sides = [point.side for point in points]
        self._tap = Tap([point.module for point in points])
        self._head, self._uses_logits = Head(model), any(term.uses_teacher_logits for term in terms)
        self._engine = build_teacher(model, config, teacher_config)

    def answer(self, inputs: dict[str, Any], batch: Batch, positions: torch.Tensor, terms: Iterable[LossTerm],
               student_features: dict[int, torch.Tensor]) -> torch.Tensor:
        """Logits (R, V) of `positions` (R,), indices of the flattened (B, T); no rows where no term reads them.

        Each feature of the student is compared, and dropped, when the teacher's appears; no feature of the teacher
        outlives its block.
        """
        attends = batch.attends
        if self._counts_padding and "encoder" in attends:
            attends["encoder"] = torch.ones_like(attends["encoder"])
        comparing = [term for term in terms if term.uses_features]

        def compare(index: int, feature: torch.Tensor) -> None:
            student_feature = student_features.pop(index)
            with torch.enable_grad():
                for term in comparing:
                    term.add_features(student_feature, feature, attends[self._sides[index]])

        with torch.no_grad(), self._tap.visiting(compare):
            return self._head.logits(self._engine, inputs, positions if self._uses_logits else positions[:0])


def feature_points(model: PreTrainedModel, loss: LossConfig) -> list[FeaturePoint]:
    """The modules whose outputs `loss` compares."""
    points = family_of(model).feature_points(model, loss.features)
    return [point for point in points if loss.layers is None or point.block in loss.layers]
