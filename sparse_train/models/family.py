"""What the rest of the package must know about an architecture: its blocks, and which linears of a block are pruned."""

from dataclasses import dataclass

from torch import nn

from sparse_train.errors import UserError
from sparse_train.sparse import SparseLinear


@dataclass(frozen=True)
class Family:
    model_type: str
    """`config.model_type` of transformers."""
    blocks: str
    """Dotted name of the ModuleList of blocks. Block outputs are the feature points of SquareHead."""
    final_norm: str
    """Dotted name of the norm between the last block and the head."""
    prunable: tuple[str, ...]
    """Linears of a block that are pruned, by their names below it."""

    def block_list(self, model: nn.Module) -> nn.ModuleList:
        return model.get_submodule(self.blocks)

    def feature_points(self, model: nn.Module, last: str = "block") -> list[nn.Module]:
        """The modules whose outputs are SquareHead's features: all blocks; `last` "norm" puts the final norm's output
        in the place of the last block's."""
        blocks = list(self.block_list(model))
        return blocks if last == "block" else [*blocks[:-1], model.get_submodule(self.final_norm)]

    def prunable_linears(self, model: nn.Module) -> dict[str, nn.Linear | SparseLinear]:
        """Full module name -> linear, in the order in which the model runs them."""
        return {
            f"{self.blocks}.{index}.{name}": block.get_submodule(name)
            for index, block in enumerate(self.block_list(model))
            for name in self.prunable
        }


# MPT (MosaicML 2023): embeddings are tied to the head and stay dense, as in the paper (PAPER: Wqkv, out_proj, ffn).
_FAMILIES = {
    "mpt": Family("mpt", "transformer.blocks", "transformer.norm_f",
                  ("attn.Wqkv", "attn.out_proj", "ffn.up_proj", "ffn.down_proj")),
}


def family_of(model: nn.Module) -> Family:
    model_type = model.config.model_type
    if model_type not in _FAMILIES:
        raise UserError(f"model type {model_type!r} is not supported; choose one of: {', '.join(_FAMILIES)}")
    return _FAMILIES[model_type]


def block_output(output) -> "object":
    """A block's hidden state (B, T, D): the output itself or the first of its tuple."""
    return output[0] if isinstance(output, tuple) else output
