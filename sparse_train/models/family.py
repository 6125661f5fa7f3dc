"""What the package must know about an architecture: `Family`, the base class of sparse_train/models/families."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    WhisperFeatureExtractor,
)

from sparse_train.compat.transformers import separates_sequences
from sparse_train.config import ModelConfig
from sparse_train.errors import UserError
from sparse_train.sparse import SparseLinear


@dataclass(frozen=True)
class Stack:
    blocks: str
    """Dotted name of the ModuleList of blocks. Block outputs are the feature points of SquareHead."""
    final_norm: str | None
    """Dotted name of the norm behind the last block, where there is one."""
    side: str = "decoder"
    """Whose tokens its states belong to: encoder, or decoder, which a model without an encoder is as well."""
    first_norm: str | None = None
    """Dotted name, inside a block, of the norm that reads the block's input, where there is one."""


@dataclass(frozen=True)
class FeaturePoint:
    side: str
    block: int
    """Index in its stack."""
    module: nn.Module
    """Its output, or the first of its tuple, is the feature (B, T, D)."""


class HeadExchange(Protocol):
    """Swaps the split dimension between the ranks that share a sequence. B batch, H heads, T tokens, P ranks, D width.
    """
    rank: int

    def to_heads(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, T / P, D) -> (B, H / P, T, D)."""
        ...

    def to_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H / P, T, D) -> (B, H, T / P, D)."""
        ...


class Family:
    """An architecture. The defaults describe a text model that is not in the table `sparse_train.registry.FAMILIES`;
    a subclass states what differs.

    A family that is only pruned and fine-tuned needs `stacks` and `prunable`; one that is trained from scratch
    `new_config` as well.
    """
    stacks: tuple[Stack, ...] = ()
    """In the order in which the model runs them."""
    prunable: tuple[str, ...] = ()
    """Last names of the linears of a block that are pruned; everything else stays dense."""
    takes_audio: bool = False
    """Whether the encoder reads audio instead of text."""
    needs_example_mask: bool = False
    """Whether packed examples need a mask of ours, because transformers makes none from position_ids."""
    prefix_length: int = 1
    """Of an encoder-decoder: the most tokens that the answers of a published model start from."""

    def auto_class(self, config: PretrainedConfig) -> Any:
        """The class of transformers that makes models with the head that predicts text."""
        return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM

    def new_config(self, size: ModelConfig, tokens: dict[str, Any]) -> PretrainedConfig:
        """The config of a new model. `tokens`: vocab_size, eos_token_id, bos_token_id and pad_token_id."""
        raise UserError(f"model.family={size.family}: no new model of this family can be made; start from a published "
                        "one (model.path)")

    def new_features(self, size: ModelConfig) -> WhisperFeatureExtractor | None:
        """What turns audio into the input of a new model."""
        return None

    def load_features(self, path: str | Path) -> WhisperFeatureExtractor | None:
        """What turns audio into the input of the model in a folder or on the hub. Raises UserError."""
        return None

    def check_config(self, source: str | Path, config: dict[str, Any]) -> None:
        """Raises UserError, naming `source`, for a config.json of which transformers would make another model."""

    def needs_language(self, config: PretrainedConfig) -> bool:
        """Whether a published model must be told which language it hears (task.language)."""
        return False

    def task_prefix(self, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig,
                    language: str | None) -> tuple[int, ...]:
        """Tokens that tell the decoder what to do, in the place of those that its config names; empty: there are none.

        Raises UserError for a language that the model does not know.
        """
        return ()

    def split_attention(self, model: PreTrainedModel, exchange: HeadExchange) -> bool:
        """Make the attention of `model` span the ranks of a sequence, in place.

        False, and nothing done, where transformers' attention interface does it.
        """
        return False

    def separate_examples(self, model: PreTrainedModel) -> None:
        """Let `model` take rows of several examples, by position_ids that start at 0 in each and no attention_mask.

        Raises UserError for a model that cannot keep them apart.
        """
        if self.needs_example_mask:
            model.register_forward_pre_hook(_add_example_mask, with_kwargs=True)
        elif not separates_sequences(model):
            raise UserError(f"task.pack=true: a {model.config.model_type} model cannot keep the examples of a window "
                            "apart; leave task.pack out")

    def blocks(self, model: nn.Module) -> dict[str, nn.Module]:
        """Full module name -> block, in the order in which the model runs them."""
        return {f"{stack.blocks}.{index}": block for stack in self.stacks
                for index, block in enumerate(_list_of_blocks(model, stack))}

    def feature_points(self, model: PreTrainedModel, features: str = "blocks") -> list[FeaturePoint]:
        """One per block; `features` as in LossConfig: the block itself, or the norm that reads its output.

        Raises UserError where a stack has no such norm.
        """
        points = []
        for stack in self.stacks:
            modules: list[nn.Module] = list(_list_of_blocks(model, stack))
            if features == "norms":
                modules[:-1] = [_norm(model, stack, block, stack.first_norm, "norms", "at the start of each block of")
                                for block in modules[1:]]
            if features != "blocks":
                modules[-1] = _norm(model, stack, model, stack.final_norm, features, "behind")
            points += [FeaturePoint(stack.side, index, module) for index, module in enumerate(modules)]
        return points

    def dense_linears(self, model: nn.Module) -> dict[str, nn.Linear]:
        """prunable_linears of a model without sparse layers."""
        return {name: linear for name, linear in self.prunable_linears(model).items() if isinstance(linear, nn.Linear)}

    def prunable_linears(self, model: nn.Module) -> dict[str, nn.Linear | SparseLinear]:
        """Full module name -> linear, block after block."""
        return {f"{prefix}.{name}": module for prefix, block in self.blocks(model).items()
                for name, module in block.named_modules()
                if isinstance(module, (nn.Linear, SparseLinear)) and name.rpartition(".")[2] in self.prunable}


def _add_example_mask(model: PreTrainedModel, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """A hook that makes attention_mask (B, 1, T, T) of position_ids (B, T): the smallest number wherever a token must
    not attend, so that masks of either kind, added to scores or true where hidden, agree."""
    positions = kwargs.get("position_ids")
    if positions is None:
        return args, kwargs
    example = (positions == 0).cumsum(1)
    is_later = torch.ones(positions.shape[1:] * 2, dtype=torch.bool, device=positions.device).triu(1)
    hidden = (example[:, :, None] != example[:, None, :]) | is_later
    mask = hidden.to(model.dtype) * torch.finfo(model.dtype).min
    return args, {**kwargs, "attention_mask": mask[:, None]}


def _list_of_blocks(model: nn.Module, stack: Stack) -> nn.ModuleList:
    blocks = model.get_submodule(stack.blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def _norm(model: PreTrainedModel, stack: Stack, parent: nn.Module, name: str | None, features: str,
          place: str) -> nn.Module:
    """The module `name` of `parent`, which is `place` the blocks of `stack`."""
    modules = dict(parent.named_modules())
    if name is None or name not in modules:  # OPT has a final norm or not, as its config says
        raise UserError(f"features={features}: this {model.config.model_type} model has no norm {place} "
                        f"{stack.blocks}; use features=blocks")
    return modules[name]


def decoder_sizes(size: ModelConfig) -> dict[str, Any]:
    """`size` under the names that the configs of most decoders share."""
    return {"hidden_size": size.d_model, "num_hidden_layers": size.n_layers, "num_attention_heads": size.n_heads,
            "intermediate_size": size.ffn_width, "max_position_embeddings": size.max_seq_len}


def block_output(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """A block's hidden state (B, T, D): the output itself or the first of its tuple."""
    return output[0] if isinstance(output, tuple) else output
