"""What each loss makes of a student's gradient, and how far single tokens outweigh the others in the teacher.

A row is one term L with weight 1, in fp32 on one process. Each figure but the last is a mean over batches:

    value      L
    gradient   |g|, the norm of L's gradient g with respect to all trained parameters
    cosine     <g, g_CE> / (|g| |g_CE|), where g_CE is the gradient of the cross-entropy
    weight     |g_block| / |g|: with it, L's gradient is as large as that of SquareHead as the paper has it
"""

import contextlib
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any, get_args

import torch
from transformers import PreTrainedModel

from sparse_train.config import LossConfig
from sparse_train.errors import UserError
from sparse_train.models import family_of
from sparse_train.models.family import FeaturePoint
from sparse_train.tasks import Batch
from sparse_train.tasks.batch import IGNORED
from sparse_train.training.features import Tap
from sparse_train.training.head import Head
from sparse_train.training.losses import new_terms, weighted_loss
from sparse_train.training.terms import ModelOutputs

_RATIOS = get_args(LossConfig.model_fields["feature_ratio"].annotation)


def measure_losses(student: PreTrainedModel, teacher: PreTrainedModel, batches: Iterable[Batch]) -> dict[str, Any]:
    """Under rows: a row per term, for the features one per form of SquareHead. Under largest_tokens: per block of the
    teacher, the norm of its largest token over that of its median token.

    Raises UserError where the two models are not of one type and size.
    """
    names = list(family_of(teacher).blocks(teacher))
    sizes = [(model.config.model_type, len(family_of(model).blocks(model)), model.get_input_embeddings().weight.shape)
             for model in (student, teacher)]
    if sizes[0] != sizes[1]:
        raise UserError("student and teacher are not of one type and size; as the teacher, give the dense model that "
                        "the student was pruned from")
    models = _Tapped(student), _Tapped(teacher)
    measured = [_measure(*models, batch) for batch in batches]
    rows = []
    for same in zip(*(rows for rows, _ in measured), strict=True):
        rows.append(same[0] | {key: fmean(row[key] for row in same) for key in ("value", "gradient", "cosine")})
    of_block = next(row["gradient"] for row in rows if row["ratio"] == "block")
    return {"rows": [row | {"weight": of_block / row["gradient"]} for row in rows],
            "largest_tokens": dict(zip(names, map(fmean, zip(*(largest for _, largest in measured), strict=True)),
                                       strict=True))}


class _Tapped:
    def __init__(self, model: PreTrainedModel):
        self.model, self._head = model, Head(model)
        self.points: dict[str, list[FeaturePoint]] = {}
        """By `features` of a loss, where the model has them."""
        for features in ("blocks", "norms"):
            with contextlib.suppress(UserError):
                self.points[features] = family_of(model).feature_points(model, features)
        self._taps = {features: Tap([point.module for point in points]) for features, points in self.points.items()}

    def answer(self, batch: Batch, positions: torch.Tensor) -> tuple[torch.Tensor, dict[str, dict[int, torch.Tensor]]]:
        """(logits (R, V) of `positions` (R,), `features` of a loss -> index of the point -> (B, T, D))."""
        states: dict[str, dict[int, torch.Tensor]] = {features: {} for features in self._taps}
        with contextlib.ExitStack() as stack:
            for features, tap in self._taps.items():
                stack.enter_context(tap.visiting(states[features].__setitem__))
            return self._head.logits(self.model, batch.inputs() | {"use_cache": False}, positions), states


def _measure(student: _Tapped, teacher: _Tapped, batch: Batch) -> tuple[list[dict[str, Any]], list[float]]:
    """(the rows of one batch, without weights; the largest tokens)."""
    positions = (batch.targets != IGNORED).flatten().nonzero().squeeze(1)
    logits, states = student.answer(batch, positions)
    with torch.no_grad():
        teacher_logits, taught = teacher.answer(batch, positions)
    outputs = ModelOutputs(logits, batch.targets.flatten()[positions], batch.labels.flatten()[positions],
                           teacher_logits)
    parameters = [parameter for parameter in student.model.parameters() if parameter.requires_grad]
    rows: list[dict[str, Any]] = []
    of_task: Sequence[torch.Tensor] = ()
    for term, loss in _losses(student.points):
        terms = new_terms(loss)
        if loss.feature_weight:
            for index, point in enumerate(student.points[loss.features]):
                terms["feature"].add_features(states[loss.features][index], taught[loss.features][index],
                                              batch.attends[point.side])
        value = weighted_loss(loss, terms, outputs).loss
        gradient = torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True)
        of_task, norm = of_task or gradient, _product(gradient, gradient) ** 0.5
        if not norm:
            raise UserError("the student computes what the teacher does, so a loss has no gradient to compare; as the "
                            "teacher, give the dense model that the student was pruned from")
        is_feature = term == "feature"
        rows.append({"term": term, "features": loss.features if is_feature else "",
                     "ratio": loss.feature_ratio if is_feature else "", "value": value.item(), "gradient": norm,
                     "cosine": _product(gradient, of_task) / norm / (rows[0]["gradient"] if rows else norm)})
    norms = (taught["blocks"][index][batch.attends[point.side]].norm(dim=-1)
             for index, point in enumerate(teacher.points["blocks"]))
    return rows, [(norm.max() / norm.median()).item() for norm in norms]


def _losses(kinds: Iterable[str]) -> Iterable[tuple[str, LossConfig]]:
    """(name of a term, a loss of it alone with weight 1), cross-entropy first."""
    yield "task", LossConfig()
    yield "logit", LossConfig(task_weight=0, logit_weight=1.0)
    for features in kinds:
        for ratio in _RATIOS:
            yield "feature", LossConfig(task_weight=0, feature_weight=1.0, features=features, feature_ratio=ratio)


def _product(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> float:
    """The inner product over all parameters."""
    return sum(torch.sum(a * b, dtype=torch.float64).item() for a, b in zip(first, second, strict=True))
