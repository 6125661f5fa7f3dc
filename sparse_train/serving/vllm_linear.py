"""vLLM's linears with sparse weights.

A layer has a parameter for each part of a stored weight, without entries: how many values there will be is known only
when they are read. vLLM gives each part that it finds to the parameter of its name, as `q`, `k` and `v` of a layer that
multiplies all three, and once with all rows where the model's file has them in one. Which rows and columns a rank takes
of them (heads, replicas of heads, the vocabulary with its padding), vLLM's own loader says: it is given the numbers of
the rows in place of a weight.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import LinearMethodBase

from sparse_train.errors import UserError
from sparse_train.kernels import PackedMatrix
from sparse_train.kernels.ops import define_operator
from sparse_train.serving.vllm import SparseTrainConfig
from sparse_train.sparse import (
    BitmaskTensor,
    PackedLinear,
    Stored,
    on_gpu,
    read_weight,
    require_finite,
    stack_rows,
    take_columns,
    take_rows,
)

_STORED = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8,
           "int4": torch.uint8}


class SparseLinearMethod(LinearMethodBase):
    """Of layers with a sparse weight in any part. The parameters of other parts of the layer may be dense.

    On the CPU activations become float32 for a product, which is exact for BF16, and integers quantise them to 8 bits
    per token; the result has the model's dtype again. A rank quantises the columns that it has. On a GPU they are BF16.
    """

    def __init__(self, config: SparseTrainConfig):
        self.config = config

    def create_weights(self, layer: Any, input_size_per_partition: int, output_partition_sizes: list[int],
                       input_size: int, output_size: int, params_dtype: torch.dtype, **attributes: Any) -> None:
        vllm_config = get_current_vllm_config()
        # As attention does it: a compiled graph has the name, and finds the layer of this process by it.
        layers, name = vllm_config.compilation_config.static_forward_context, f"{layer.prefix}.sparse"
        while name in layers:
            name += "'"
        layers[name] = layer
        num_rows = sum(output_partition_sizes)
        vocabulary = getattr(layer, "shard_indices", None)  # which is filled up to the width of a head
        layer.sparse_name, layer.sparse_rows = name, num_rows
        layer.sparse_parts = _Parts(f"{self.config.folder}: {layer.prefix}", num_rows,
                                    vocabulary.num_org_elements if vocabulary else num_rows, input_size,
                                    input_size_per_partition, attributes["weight_loader"])
        layer.sparse_batch = vllm_config.scheduler_config.max_num_seqs
        dtypes = {"values": _STORED[self.config.precision], "bitmask": torch.uint8, "weight": params_dtype,
                  "scale": torch.bfloat16 if self.config.precision == "int4" else torch.float32}
        for part, dtype in dtypes.items():
            parameter = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            setattr(parameter, "weight_loader", layer.sparse_parts.taking(part))  # noqa: B010 - it is vLLM's
            layer.register_parameter(part, parameter)

        def register(name: str, parameter: nn.Parameter | None) -> None:
            if name == "bias" and parameter is not None:
                parameter.data.zero_()
            nn.Module.register_parameter(layer, name, parameter)

        # The layer makes its bias next, of memory as it is. Whisper's keys have none in the file, and vLLM fills theirs
        # by the name of a dense weight.
        layer.register_parameter = register

    def process_weights_after_loading(self, layer: Any) -> None:
        parts, device = layer.sparse_parts, layer.values.device
        stored = parts.finish()
        layer.sparse_product = _Product(
            [PackedLinear(PackedMatrix(weight.values, weight.bitmask, weight.shape[1], scale)) if device.type == "cpu"
             else on_gpu((weight, scale), device, layer.sparse_batch) for weight, scale in stored],
            parts.num_front, layer.sparse_rows - sum(weight.shape[0] for weight, _ in stored))
        del layer.sparse_parts, layer.register_parameter, layer.values, layer.bitmask, layer.scale, layer.weight

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        y = (torch.ops.sparse_train.vllm_linear(x, layer.sparse_name, layer.sparse_rows)
             if torch.compiler.is_compiling() else layer.sparse_product(x))
        return y if bias is None else y + bias


define_operator("vllm_linear(Tensor x, str layer, SymInt num_rows) -> Tensor",
                lambda x, layer, num_rows: get_forward_context().no_compile_layers[layer].sparse_product(x),
                lambda x, layer, num_rows: x.new_empty(*x.shape[:-1], num_rows))


@dataclass(frozen=True)
class _Product:
    """y (..., R) = x (..., C) W^T."""

    linears: list[Any]
    """Of consecutive rows; PackedLinears, or on a GPU nn.Linears."""
    num_front: int
    """Zeros in front of x, as take_columns has them."""
    num_behind: int
    """Zeros behind y."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        own = functional.pad(x.to(self.linears[0].weight.dtype), (self.num_front, 0))
        y = torch.cat([linear(own) for linear in self.linears], -1) if len(self.linears) > 1 else self.linears[0](own)
        return functional.pad(y.to(x.dtype), (0, self.num_behind))


class _Parts:
    """The stored weights of a layer, of this rank, from tensors that come in any order."""

    def __init__(self, where: str, num_rows: int, num_filled: int, num_columns: int, num_own_columns: int,
                 load: Callable[..., None]):
        """`num_rows`: of this rank, the first `num_filled` of which are in the file; `num_columns`: in the file, for
        all ranks; `load`: vLLM's, which takes a rank's part."""
        self._where, self._num_rows, self._num_filled = where, num_rows, num_filled
        self._num_columns, self._num_own_columns, self._load = num_columns, num_own_columns, load
        self._tensors: dict[Any, dict[str, torch.Tensor]] = {}  # by vLLM's name of the shard, and the part
        self._cut: list[tuple[int, Stored]] = []  # first row in the layer, and the rows from there on
        self.num_front = 0

    def taking(self, part: str) -> Callable[..., None]:
        """The loader of a parameter."""
        def take(parameter: nn.Parameter, tensor: torch.Tensor, shard: Any = None) -> None:
            tensors = self._tensors.setdefault(shard, {})
            tensors[part] = tensor.detach().cpu()
            if "weight" in tensors or ({"values", "bitmask"} <= tensors.keys() and (
                    tensors["values"].is_floating_point() or "scale" in tensors)):
                self._cut.append(self._own(shard, self._tensors.pop(shard)))
        return take

    def finish(self) -> list[Stored]:
        """All rows of the layer, in as few weights as their dtypes allow. Raises UserError where some did not come."""
        stacks: list[list[Stored]] = []
        kind: Any = None
        end = 0
        for start, (weight, scale) in sorted(self._cut, key=lambda cut: cut[0]):
            if start != end:
                break
            if kind != (weight.dtype, scale is not None and scale.ndim):
                kind = weight.dtype, scale is not None and scale.ndim
                stacks.append([])
            stacks[-1].append((weight, scale))
            end += weight.shape[0]
        if self._tensors or end != self._num_filled:
            raise UserError(f"{self._where} has {end} of its {self._num_filled} rows in the file; each sparse weight "
                            "needs values and a bitmask, and a scale where the values are integers; fetch or write the "
                            "folder again")
        return [stack_rows(stack) for stack in stacks]

    def _own(self, shard: Any, tensors: dict[str, torch.Tensor]) -> tuple[int, Stored]:
        """This rank's rows and columns, and where in the layer the rows begin."""
        where, dense = self._where if shard is None else f"{self._where} ({shard})", tensors.get("weight")
        if dense is None:
            weight = read_weight(where, require_finite(where, tensors["values"]), tensors["bitmask"],
                                 self._num_columns)
        else:
            weight = BitmaskTensor.from_dense(dense, torch.ones_like(dense, dtype=torch.bool))
        stored: Stored = (weight, tensors.get("scale"))
        rows = self._loaded(torch.zeros(self._num_rows, dtype=torch.int64), "output_dim", 0,
                            torch.arange(1, stored[0].shape[0] + 1), *(() if shard is None else (shard,)))
        places = rows.nonzero()[:, 0]
        if not len(places) or int(places[-1] - places[0]) != len(places) - 1:
            raise UserError(f"{where}: vLLM divides its rows in a way that is not supported; serve the dense export")
        stored = take_rows(*stored, rows[places] - 1)
        if self._num_own_columns != self._num_columns:
            columns = self._loaded(torch.zeros(1, self._num_own_columns, dtype=torch.int64), "input_dim", 1,
                                   torch.arange(self._num_columns)[None])[0]
            stored, self.num_front = take_columns(*stored, int(columns[0]), int(columns[-1]) + 1)
        return int(places[0]), stored

    def _loaded(self, into: torch.Tensor, attribute: str, dim: int, tensor: torch.Tensor, *shard: Any) -> torch.Tensor:
        parameter = nn.Parameter(into, requires_grad=False)
        setattr(parameter, attribute, dim)
        self._load(parameter, tensor, *shard)
        return parameter.data
