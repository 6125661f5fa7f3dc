"""A family for a model that is not in the table, inferred from its modules."""

import logging

from torch import nn
from transformers import PreTrainedModel

from sparse_train.errors import UserError
from sparse_train.models.family import Family, Stack
from sparse_train.registry import FAMILIES
from sparse_train.sparse import SparseLinear

log = logging.getLogger(__name__)

_UNSUPPORTED = {
    "Mamba": "computes with the weights of linears outside of them, where a sparse layer has no dense weight",
    "ProphetNet": "carries several states per token through its blocks, which neither calibration nor features know",
}
"""Part of a module's class name -> why a model with such a module cannot be pruned."""

# A router of experts decides where tokens go; it is small, and pruning it changes what the others see.
_ROUTERS = ("router", "gate")

_inferred: dict[str, Family] = {}


class InferredFamily(Family):
    def __init__(self, stacks: tuple[Stack, ...], prunable: tuple[str, ...]):
        self.stacks, self.prunable = stacks, prunable


def infer(model: PreTrainedModel) -> Family:
    """The family of `model`, logged the first time that its type is seen.

    Raises UserError for a model that cannot be pruned, or that has no list of equal blocks with linears.
    """
    model_type = model.config.model_type
    if model_type not in _inferred:
        _inferred[model_type] = _infer(model)
    return _inferred[model_type]


def _infer(model: PreTrainedModel) -> Family:
    model_type = model.config.model_type
    _check_supported(model)
    lists = _lists_of_blocks(model)
    stacks = [_stack(model, name) for name in lists]
    # Where some lists of blocks end in a norm, those that do not are something else, such as a tower of images.
    stacks = [stack for stack in stacks if stack.final_norm] or stacks
    if not stacks:
        raise UserError(f"model type {model_type!r} has no list of equal blocks with linears, so what to prune cannot "
                        f"be derived; supported are {', '.join(FAMILIES.entries)}")
    linears = dict.fromkeys(name for stack in stacks for name in _linears(lists[stack.blocks]))
    family = InferredFamily(tuple(stacks), tuple(name for name in linears if name not in _ROUTERS))
    log.warning("model type %r is not in the table of families; derived: blocks %s; prunable %s, %.0f%% of the blocks' "
                "parameters; features after each block", model_type, ", ".join(stack.blocks for stack in stacks),
                ", ".join(family.prunable), 100 * _prunable_share(family, model))
    return family


def _check_supported(model: PreTrainedModel) -> None:
    for part, reason in _UNSUPPORTED.items():
        if any(part in type(module).__name__ for module in model.modules()):
            raise UserError(f"model type {model.config.model_type!r} {reason}; supported are "
                            f"{', '.join(FAMILIES.entries)}")


def _lists_of_blocks(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Name -> outermost list of modules of one class, with linears in them."""
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        is_inside = any(name.startswith(f"{outer}.") for outer in lists)
        if (isinstance(module, nn.ModuleList) and not is_inside and len({type(block) for block in module}) == 1
                and _linears(module)):
            lists[name] = module
    return lists


def _linears(blocks: nn.Module) -> list[str]:
    """Last names of the linears."""
    return [name.rpartition(".")[2] for name, module in blocks.named_modules()
            if isinstance(module, (nn.Linear, SparseLinear))]


def _stack(model: PreTrainedModel, blocks: str) -> Stack:
    parent = blocks.rpartition(".")[0]
    # BART's layernorm_embedding is the norm in front of the blocks.
    norms = [name for name, child in model.get_submodule(parent).named_children()
             if "norm" in type(child).__name__.lower() and "emb" not in name]
    side = "encoder" if model.config.is_encoder_decoder and "encoder" in blocks else "decoder"
    # Models call a norm of a block's input so; blocks without one of this name may norm only what they add.
    return Stack(blocks, f"{parent}.{norms[-1]}".lstrip(".") if norms else None, side, "input_layernorm")


def _prunable_share(family: Family, model: nn.Module) -> float:
    """Of the blocks' parameters: the prunable ones. Experts in one tensor, for one, are not."""
    linears = family.prunable_linears(model)
    num_prunable = sum(linear.in_features * linear.out_features for linear in linears.values())
    # A parameter that ZeRO-3 has partitioned is empty; its ds_numel is the whole one's.
    num_others = sum(getattr(parameter, "ds_numel", parameter.numel())
                     for prefix, block in family.blocks(model).items()
                     for name, parameter in block.named_parameters(prefix)
                     if name.rpartition(".")[0] not in linears or name.endswith(".bias"))
    return num_prunable / (num_prunable + num_others)
