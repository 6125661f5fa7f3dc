"""Models read under ZeRO-3: each rank reads its own part of every tensor."""

from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch import nn
from transformers import PreTrainedModel

from sparse_train import dist
from sparse_train.compat.deepspeed import convert_to_partitioned, partition
from sparse_train.config import TeacherConfig, TrainConfig
from sparse_train.config.base import Precision
from sparse_train.models import DTYPES, ModelFolder, load_model, open_model
from sparse_train.training.engine import build_teacher, student_settings, teacher_settings
from sparse_train.training.partition import shard_bounds


def load_student(path: str | Path, config: TrainConfig) -> PreTrainedModel:
    """The model to train: partitioned while it is read under ZeRO-3, whole otherwise. Collective."""
    if config.zero.stage < 3:
        return load_model(path)
    return _load_partitioned(path, DTYPES[config.precision], student_settings(config))


def load_teacher(path: str | Path, config: TrainConfig, teacher: TeacherConfig) -> PreTrainedModel:
    """The frozen model, partitioned while it is read. Collective."""
    return _load_partitioned(path, DTYPES[teacher.precision or config.precision], teacher_settings(config, teacher))


def load_sharded(path: str | Path, precision: Precision) -> PreTrainedModel:
    """A model to ask, in eval mode, of which each rank holds a part: its forward passes are collective, and so is each
    call of one of its modules. Collective."""
    config, as_teacher = TrainConfig(precision=precision), TeacherConfig()
    return build_teacher(load_teacher(path, config, as_teacher), config, as_teacher).module


def _load_partitioned(path: str | Path, dtype: torch.dtype, settings: dict[str, Any]) -> PreTrainedModel:
    """A model under ZeRO-3 of which this rank has read its own part and nothing else.

    The memory of a whole tensor is reserved while its part is copied, but its other pages are never touched. Only what
    is put together of several stored tensors, such as fused experts, is made whole first.
    """
    model, folder = open_model(path, dtype)
    for name in dist.share(list(folder.shapes)):
        folder.bits(name)  # a range does not show whether bits and values belong together
    init = deepspeed.zero.Init(config_dict_or_path=settings, dtype=dtype)
    partitioned: dict[int, nn.Parameter] = {}  # by the id of the empty one, which tied modules share
    for module_name, module in model.named_modules():
        for short, empty in list(module.named_parameters(recurse=False)):
            if id(empty) not in partitioned:
                partitioned[id(empty)] = _read_part(init, folder, _join(module_name, short), empty)
            setattr(module, short, partitioned[id(empty)])
    for module_name, module in model.named_modules():
        for short, buffer in list(module.named_buffers(recurse=False)):
            whole = folder.get(_join(module_name, short)) if buffer.is_meta else buffer
            module._buffers[short] = whole.to(dist.device())
    return model


def _join(module_name: str, name: str) -> str:
    return f"{module_name}.{name}" if module_name else name


def _read_part(init: deepspeed.zero.Init, folder: ModelFolder, name: str, empty: nn.Parameter) -> nn.Parameter:
    whole = torch.empty(empty.shape, dtype=empty.dtype, device=dist.device())
    parameter = nn.Parameter(whole, requires_grad=empty.requires_grad)
    convert_to_partitioned(init, parameter)
    start, stop = shard_bounds(whole.numel(), dist.rank(), dist.world_size())
    part = folder.get_range(name, start, stop) if empty.is_meta else empty.detach().flatten()[start:stop]
    whole.view(-1)[start:stop] = part.to(whole)
    partition(parameter)
    return parameter
