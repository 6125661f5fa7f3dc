"""Sparse layers put into a model and taken out of it."""

from collections.abc import Mapping
from typing import TypeVar, cast

from torch import nn

from sparse_train.sparse.bitmask import BitmaskTensor
from sparse_train.sparse.linear import SparseLinear, sparse_linears
from sparse_train.sparse.save import save_through_us

Model = TypeVar("Model", bound=nn.Module)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place that `name` (dotted) has in `model`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def sparsify(model: Model, weights: Mapping[str, BitmaskTensor]) -> Model:
    """Replace the linears named in `weights` by SparseLinears that hold them; returns `model`."""
    for name, weight in weights.items():
        linear = cast(nn.Linear, model.get_submodule(name))
        if tuple(linear.weight.shape) != weight.shape:
            raise ValueError(f"{name} has shape {tuple(linear.weight.shape)}, its sparse weight {weight.shape}")
        replace_module(model, name, SparseLinear(weight, linear.bias))
    save_through_us(model)
    return model


def densify(model: Model) -> Model:
    """Replace every SparseLinear by an `nn.Linear` with the zeros in place; returns `model`."""
    for name, sparse in sparse_linears(model).items():
        linear = nn.Linear(sparse.in_features, sparse.out_features, sparse.bias is not None, device="meta")
        linear.weight = nn.Parameter(sparse.weight.to_dense())
        linear.register_parameter("bias", sparse.bias)
        replace_module(model, name, linear)
    return model
