"""Models on the CPU: in FP32, sparse weights and BF16 tables as PackedMatrix."""

import torch
from torch import nn
from transformers import PreTrainedModel

from sparse_train.inference.shared import pack_shared
from sparse_train.kernels import PackedMatrix, pack
from sparse_train.models import ModelFolder
from sparse_train.sparse import PackedEmbedding, PackedLinear


def packed_modules(model: PreTrainedModel, tensors: ModelFolder, shared: bool) -> dict[str, nn.Module]:
    """What computes with the packed weights of a sparse folder, by the names of the modules in `model` that it
    replaces. `shared`: as in load."""
    tables = _bf16_tables(model, tensors)

    def packed_weight(name: str) -> PackedMatrix:
        if name in tables:
            return _pack_whole(tensors.get(f"{name}.weight"))
        weight = tensors.weight(name)
        return PackedMatrix(weight.values, weight.bitmask, tensors.shapes[name][1], tensors.scale(name))

    # The largest first: beside it lies what it is packed from, and the fewer others the better.
    names = [*dict.fromkeys(tables.values()), *tensors.shapes]
    weights = (pack_shared(tensors.folder, names, packed_weight) if shared
               else {name: packed_weight(name) for name in names})
    modules: dict[str, nn.Module] = {}
    for name in packed_names(model, tensors):
        packed = weights[tables.get(name, name)]
        bias = tensors.get(f"{name}.bias").float() if f"{name}.bias" in tensors else None
        is_table = isinstance(model.get_submodule(name), nn.Embedding)
        modules[name] = PackedEmbedding(packed) if is_table else PackedLinear(packed, bias)
    return modules


def packed_names(model: PreTrainedModel, tensors: ModelFolder) -> list[str]:
    """Of packed_modules, before anything is packed."""
    return [*_bf16_tables(model, tensors), *tensors.shapes]


def _bf16_tables(model: PreTrainedModel, tensors: ModelFolder) -> dict[str, str]:
    """Names of the embedding's modules and of the head, where they are stored in BF16: -> the first with its weight."""
    owners = {id(module.weight): "" for module in (model.get_input_embeddings(), model.get_output_embeddings())
              if type(module) in (nn.Embedding, nn.Linear)}
    tables = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if (type(module) in (nn.Embedding, nn.Linear) and id(module.weight) in owners
                and tensors.spec(f"{name}.weight")[1] == "BF16"):
            owners[id(module.weight)] = owners[id(module.weight)] or name
            tables[name] = owners[id(module.weight)]
    return tables


def _pack_whole(weight: torch.Tensor) -> PackedMatrix:
    """A dense weight (R, C)."""
    rows, columns = weight.shape
    return PackedMatrix(weight.flatten(), pack(torch.ones(1, columns, dtype=torch.bool)).expand(rows, -1), columns)
