"""The shapes of a decoder's linears, for an engine that is given no whole model."""

import json
from pathlib import Path

from torch import nn

from sparse_train.models import open_model


def write_linears(folder: str | Path, precision: str, file: Path) -> int:
    """Write [precision, [[R, C], ...]] of the model in `folder` to `file`, the head last; returns the bytes of these
    weights, with an fp32 scale per 32 of int4."""
    model, _ = open_model(folder)
    head = model.get_output_embeddings()
    linears = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    shapes = [(linear.out_features, linear.in_features) for linear in (*linears, head)]
    file.write_text(json.dumps([precision, shapes]), encoding="utf-8")
    return sum(rows * columns for rows, columns in shapes) * {"int8": 8, "int4": 5}[precision] // 8
