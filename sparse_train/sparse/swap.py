"""Replaces linears of a model by SparseLinears, and back."""

from collections.abc import Mapping
from typing import TypeVar, cast

from torch import nn

from sparse_train.sparse.bitmask import BitmaskTensor
from sparse_train.sparse.linear import SparseLinear, sparse_linears
from sparse_train.sparse.save import patch_save_pretrained

Model = TypeVar("Model", bound=nn.Module)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the submodule of `model` at the dotted `name` by `module`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def sparsify(model: Model, weights: Mapping[str, BitmaskTensor]) -> Model:
    """Replace the linears named in `weights` by SparseLinears with those weights; returns `model`.

    Raises ValueError where a shape differs.
    """
    for name, weight in weights.items():
        linear = cast(nn.Linear, model.get_submodule(name))
        if tuple(linear.weight.shape) != weight.shape:
            raise ValueError(f"{name} has shape {tuple(linear.weight.shape)}, its sparse weight {weight.shape}")
        replace_module(model, name, SparseLinear(weight, linear.bias))
    patch_save_pretrained(model)
    return model


def densify(model: Model) -> Model:
    """Replace every SparseLinear by an `nn.Linear` with the zeros in place, one after the other; returns `model`."""
    remaining = sparse_linears(model)  # held no longer than the model does, so that no two models are in memory
    for name in list(remaining):
        sparse = remaining.pop(name)
        linear = nn.Linear(sparse.in_features, sparse.out_features, sparse.bias is not None, device="meta")
        linear.weight = nn.Parameter(sparse.weight.to_dense())
        linear.register_parameter("bias", sparse.bias)
        replace_module(model, name, linear)
    return model
