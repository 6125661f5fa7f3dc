"""Hugging Face's layout with every zero in place: read by from_pretrained and by what is built on it."""

from pathlib import Path

import torch

from sparse_train.compress import export_dense
from sparse_train.exporters.source import Source
from sparse_train.models import DTYPES

_DTYPES = DTYPES | {"fp16": torch.float16}


def write(source: Source, out: Path, type_: str | None) -> None:
    """Codes are multiplied out, in fp32 unless `type_` is another one."""
    dtype = _DTYPES.get(type_ or source.precision, torch.float32)
    source.model.config.dtype = dtype
    export_dense(torch.nn.Module.to(source.model, dtype), source.processor, out, source.tensors)
