"""compressed-tensors, which vLLM and transformers read: linears with integer weights, in its dense formats.

    w8a8    int-quantized: codes (R, C) int8 with a scale per row; inputs are rounded to 8 bits per token as it runs
    w4a16   pack-quantized: codes -8..7, eight in an int32, with a scale per row and 128 columns; inputs are not rounded

Codes and scales of int8 and int4 folders are stored as they are; a zero is the code 0. An INT4 scale may be negative:
compressed-tensors multiplies code and scale as these are. All other tensors are fp32, the head among them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sparse_train import kernels
from sparse_train.compat.transformers import saving_conversions
from sparse_train.compress import QUANTISERS
from sparse_train.errors import UserError
from sparse_train.exporters.source import Source
from sparse_train.models import own_tensors, save_model
from sparse_train.sparse import BitmaskTensor

_PRECISIONS = {"w8a8": "int8", "w4a16": "int4"}
_PER_WORD = 8  # codes of four bits in an int32


def write(source: Source, out: Path, type_: str | None) -> None:
    """Weights that are not codes of the type's precision are rounded to nearest; those that a folder keeps dense among
    its sparse ones stay so. Raises UserError where nothing says which type, and for w4a16 with rows that 128 columns do
    not divide."""
    if type_ is None and source.precision not in _PRECISIONS.values():
        raise UserError(f"{source.folder} is {source.precision}, which compressed-tensors would round; add "
                        f"--type {' or --type '.join(_PRECISIONS)}")
    type_ = type_ or next(name for name, precision in _PRECISIONS.items() if precision == source.precision)
    linears = source.linears()
    if type_ == "w4a16":
        _check_widths(source, linears)
    source.model.config.quantization_config = _config(source.model, linears, type_)
    save_model(out, source.model, source.processor, _stored(source, set(linears), type_))


def _check_widths(source: Source, linears: list[str]) -> None:
    for name in linears:
        columns = source.model.get_parameter(f"{name}.weight").shape[1]
        if columns % kernels.GROUP:
            raise UserError(f"{source.folder}: {name} has {columns} columns, and scales of w4a16 are those of "
                            f"{kernels.GROUP} columns each; use --type w8a8")


def _config(model: PreTrainedModel, linears: list[str], type_: str) -> dict[str, Any]:
    weights = {"num_bits": 8 if type_ == "w8a8" else 4, "type": "int", "symmetric": True, "dynamic": False}
    weights |= {"strategy": "channel"} if type_ == "w8a8" else {"strategy": "group", "group_size": kernels.GROUP}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    other = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - set(linears)
    save_name = saving_conversions(model).save_name
    other |= {save_name(f"{name}.weight").removesuffix(".weight") for name in other}  # which vLLM goes by
    return {"quant_method": "compressed-tensors", "quantization_status": "compressed", "ignore": sorted(other),
            "format": "int-quantized" if type_ == "w8a8" else "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights,
                                          "input_activations": inputs if type_ == "w8a8" else None}}}


def _stored(source: Source, linears: set[str], type_: str) -> Iterator[tuple[str, torch.Tensor]]:
    for name in own_tensors(source.model):
        module = name.removesuffix(".weight")
        if module not in linears:
            tensor = source.tensors.get_dense(name)
            yield name, tensor.float() if tensor.is_floating_point() else tensor
            continue
        codes, scale = _codes(source, module, _PRECISIONS[type_])
        if type_ == "w8a8":
            yield name, codes
        else:
            yield f"{name}_packed", _pack(codes)
            yield f"{name}_shape", torch.tensor(codes.shape)
        yield f"{name}_scale", scale.view(len(codes), -1).float()


def _codes(source: Source, module: str, precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes (R, C) int8 with zeros in place, scale as in sparse_train.compress)."""
    if source.precision == precision:
        weight, scale = source.tensors.weight(module), source.tensors.scale(module)
        assert scale is not None
    else:
        dense = source.tensors.get_dense(f"{module}.weight").float()
        weight, scale = QUANTISERS[precision].nearest(BitmaskTensor.from_dense(dense))
    return weight.to_dense(), scale


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """(R, C) int8 in -8..7 -> (R, C / 8) int32 of the codes plus 8, the first in the lowest bits."""
    nibbles = (codes + 8).to(torch.int32).view(len(codes), -1, _PER_WORD)
    return (nibbles << torch.arange(0, 4 * _PER_WORD, 4)).sum(2, dtype=torch.int32)
