"""What the rest of the package must know about an architecture: its stacks of blocks, and which linears are pruned."""

import logging
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig

from sparse_train.errors import UserError
from sparse_train.sparse import SparseLinear

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stack:
    blocks: str
    """Dotted name of the ModuleList of blocks. Block outputs are the feature points of SquareHead."""
    final_norm: str | None
    """Dotted name of the norm behind the last block, where there is one."""
    side: str = "decoder"
    """Whose tokens its states belong to: encoder, or decoder, which a model without an encoder is as well."""


@dataclass(frozen=True)
class FeaturePoint:
    side: str
    block: int
    """Index in its stack."""
    module: nn.Module
    """Its output, or the first of its tuple, is the feature (B, T, D)."""


@dataclass(frozen=True)
class Family:
    model_type: str
    """`config.model_type` of transformers."""
    stacks: tuple[Stack, ...]
    """In the order in which the model runs them."""
    prunable: tuple[str, ...]
    """Last names of the linears of a block that are pruned; everything else stays dense."""

    def blocks(self, model: nn.Module) -> dict[str, nn.Module]:
        """Full module name -> block, in the order in which the model runs them."""
        return {f"{stack.blocks}.{index}": block for stack in self.stacks
                for index, block in enumerate(model.get_submodule(stack.blocks))}

    def feature_points(self, model: nn.Module, last: str = "block") -> list[FeaturePoint]:
        """All blocks; `last` "norm" puts each stack's final norm in the place of its last block.

        Raises UserError where a stack ends without a norm.
        """
        points = []
        for stack in self.stacks:
            modules = list(model.get_submodule(stack.blocks))
            if last == "norm":
                # OPT has one or not, as its config says.
                modules[-1] = dict(model.named_modules()).get(stack.final_norm)
                if modules[-1] is None:
                    raise UserError(f"final_feature=norm: this {self.model_type} model has no norm behind "
                                    f"{stack.blocks}; use final_feature=block")
            points += [FeaturePoint(stack.side, index, module) for index, module in enumerate(modules)]
        return points

    def prunable_linears(self, model: nn.Module) -> dict[str, nn.Linear | SparseLinear]:
        """Full module name -> linear, block after block."""
        return {f"{prefix}.{name}": module for prefix, block in self.blocks(model).items()
                for name, module in block.named_modules()
                if isinstance(module, (nn.Linear, SparseLinear)) and name.rpartition(".")[2] in self.prunable}


def _decoder(model_type: str, root: str, blocks: str, norm: str, *prunable: str) -> Family:
    return Family(model_type, (Stack(f"{root}.{blocks}", f"{root}.{norm}"),), prunable)


_GATED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# Embeddings, heads and norms stay dense, as in the paper; so do T5's relative positions and Whisper's convolutions.
_FAMILIES = {family.model_type: family for family in (
    _decoder("mpt", "transformer", "blocks", "norm_f", "Wqkv", "out_proj", "up_proj", "down_proj"),
    _decoder("llama", "model", "layers", "norm", *_GATED),
    _decoder("mistral", "model", "layers", "norm", *_GATED),
    _decoder("qwen3", "model", "layers", "norm", *_GATED),
    _decoder("olmo2", "model", "layers", "norm", *_GATED),
    _decoder("gpt_neox", "gpt_neox", "layers", "final_layer_norm",
             "query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    _decoder("opt", "model.decoder", "layers", "final_layer_norm",
             "q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    Family("t5", (Stack("encoder.block", "encoder.final_layer_norm", "encoder"),
                  Stack("decoder.block", "decoder.final_layer_norm")),
           ("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo")),
    Family("whisper", (Stack("model.encoder.layers", "model.encoder.layer_norm", "encoder"),
                       Stack("model.decoder.layers", "model.decoder.layer_norm")),
           ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")),
)}


_derived: dict[str, Family] = {}


def family_of(model: nn.Module) -> Family:
    """The table's entry, or one derived from the modules of `model`, which is said."""
    model_type = model.config.model_type
    if model_type not in _FAMILIES and model_type not in _derived:
        # Sparse layers do not change what is derived: the names count.
        _derived[model_type] = _derive(model)
    return _FAMILIES.get(model_type) or _derived[model_type]


_REFUSED = {
    "Mamba": "computes with the weights of linears outside of them, where a sparse layer has no dense weight",
    "ProphetNet": "carries several states per token through its blocks, which neither calibration nor features know",
}


def _derive(model: nn.Module) -> Family:
    config: PretrainedConfig = model.config
    for part, reason in _REFUSED.items():
        if any(part in type(module).__name__ for module in model.modules()):
            raise UserError(f"model type {config.model_type!r} {reason}; supported are {', '.join(_FAMILIES)}")
    stacks: list[Stack] = []
    names: dict[str, dict[str, None]] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{stack.blocks}.") for stack in stacks)
        if not isinstance(module, nn.ModuleList) or inside or len({type(block) for block in module}) != 1:
            continue
        linears = [name.rpartition(".")[2] for name, part in module.named_modules()
                   if isinstance(part, (nn.Linear, SparseLinear))]
        if not linears:
            continue
        parent = path.rpartition(".")[0]
        # BART's layernorm_embedding is the norm in front of the blocks.
        behind = [name for name, child in model.get_submodule(parent).named_children()
                  if "norm" in type(child).__name__.lower() and "emb" not in name]
        side = "encoder" if config.is_encoder_decoder and "encoder" in path else "decoder"
        stacks.append(Stack(path, f"{parent}.{behind[-1]}".lstrip(".") if behind else None, side))
        # A router of experts decides where tokens go; it is small, and pruning it changes what the others see.
        names[path] = dict.fromkeys(name for name in linears if name not in ("router", "gate"))
    # Where some lists of blocks end in a norm, those that do not are something else, such as a tower of images.
    stacks = [stack for stack in stacks if stack.final_norm] or stacks
    if not stacks:
        raise UserError(f"model type {config.model_type!r} has no list of equal blocks with linears, so what to prune "
                        f"cannot be derived; supported are {', '.join(_FAMILIES)}")
    prunable = tuple({name: None for stack in stacks for name in names[stack.blocks]})
    family = Family(config.model_type, tuple(stacks), prunable)
    log.warning("model type %r is not in the table of families; derived: blocks %s; prunable %s, %.0f%% of the blocks' "
                "parameters; features after each block", config.model_type, ", ".join(s.blocks for s in stacks),
                ", ".join(prunable), 100 * _share(family, model))
    return family


def _share(family: Family, model: nn.Module) -> float:
    """Of the blocks' parameters: prunable. Experts in one tensor, for one, are not."""
    linears = family.prunable_linears(model)
    prunable = sum(linear.in_features * linear.out_features for linear in linears.values())
    # A partitioned parameter is empty, and says how large it is.
    rest = sum(getattr(parameter, "ds_numel", parameter.numel()) for prefix, block in family.blocks(model).items()
               for name, parameter in block.named_parameters(prefix)
               if name.rpartition(".")[0] not in linears or name.endswith(".bias"))
    return prunable / (prunable + rest)


def block_output(output) -> "object":
    """A block's hidden state (B, T, D): the output itself or the first of its tuple."""
    return output[0] if isinstance(output, tuple) else output
