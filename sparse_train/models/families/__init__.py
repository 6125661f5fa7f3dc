"""The families of sparse_train.registry.FAMILIES, a file per architecture; inferred.py is for all other models."""

import functools

from transformers import PreTrainedModel

from sparse_train.models.families.inferred import infer
from sparse_train.models.family import Family
from sparse_train.registry import FAMILIES


@functools.cache
def registered_family(name: str) -> Family | None:
    """The table's entry of that name, which is a model_type of transformers, or a variant of one."""
    return FAMILIES.load(name)() if name in FAMILIES.entries else None


def family_of_type(model_type: str) -> Family:
    """The table's entry, or what holds for text models that are not in it: without blocks, which only a model has."""
    return registered_family(model_type) or Family()


def family_of(model: PreTrainedModel) -> Family:
    """The table's entry, or one inferred from the modules of `model`, which is logged. Raises UserError where there is
    nothing to prune."""
    # A sparse model infers to the same family as the dense one: SparseLinears count as linears.
    return registered_family(model.config.model_type) or infer(model)
