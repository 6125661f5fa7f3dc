"""Models without data: parameters on the meta device, and what transformers computes instead of reading it."""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, __version__

from sparse_train.compat.transformers import (
    has_model,
    initialise_unmarked,
    mark_initialised,
    reset_implementations,
)
from sparse_train.errors import UserError, first_line
from sparse_train.models.families import family_of_type

_LARGEST = 1 << 28
"""Entries of what is computed: a table of positions of the longest models has a tenth."""


def from_config(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of `config` with the head that predicts text. Raises UserError where there is no such model."""
    reset_implementations(config)
    auto = family_of_type(config.model_type).auto_class(config)
    if not has_model(auto, config):
        raise UserError(f"{_of(config)}model type {config.model_type!r} has no head that predicts text from text, or "
                        f"from speech as whisper's, in transformers {__version__} ({auto.__name__}); give a model that "
                        "has one")
    try:
        return auto.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # what a config of impossible sizes makes transformers and torch raise
        raise UserError(f"{_of(config)}no model that predicts text can be made of this {config.model_type} config: "
                        f"{first_line(error)}") from error


def _of(config: PretrainedConfig) -> str:
    """The folder that it was read from, in front of a message."""
    return f"{config.name_or_path}: " if config.name_or_path else ""


def empty_model(config: PretrainedConfig, dtype: torch.dtype = torch.float32,
                check: Callable[[PreTrainedModel], None] = lambda model: None) -> PreTrainedModel:
    """Parameters and buffers of checkpoints without data; buffers that are computed, such as rotary frequencies, with.

    `check` sees the model before anything is computed, in sizes that only its config tells so far. Raises UserError
    where there is no such model, and where a buffer is neither stored nor computed.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = from_config(config, dtype)
    # Some are made outside the device's context (DiffLlama's), and what is not on meta would not be read.
    for name, tensor in own_tensors(model).items():
        if not tensor.is_meta:
            _set(model, name, torch.empty_like(tensor, device="meta"))
    model.tie_weights(recompute_mapping=False)
    check(model)
    compute(model, [name for name, buffer in model.named_non_persistent_buffers() if buffer.is_meta])
    return model


def compute(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Give tensors of `model` the values that its own initialisation computes, as from_pretrained does.

    Raises UserError where that leaves one as it was or draws it at random.
    """
    if not (names := list(names)):
        return
    for name in names:
        if (count := model.get_parameter_or_buffer(name).numel()) > _LARGEST:
            raise UserError(f"{_of(model.config)}its config.json makes {name} of {count:,} numbers, more than any "
                            "model needs; give a folder that is not damaged")
    mark_initialised(model)
    runs = []
    for seed in (0, 1):  # the two begin with other values and other random numbers; what is computed is the same
        for name in names:
            empty = model.get_parameter_or_buffer(name)
            _set(model, name, torch.full_like(empty, seed, device="cpu"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            initialise_unmarked(model)
        runs.append([model.get_parameter_or_buffer(name) for name in names])
    odd = [name for name, one, other in zip(names, *runs, strict=True) if not torch.equal(one, other)]
    if odd:
        raise UserError(f"{odd[0]} of a {model.config.model_type} model is not stored in checkpoints, and transformers "
                        "does not compute it either, so what it would hold is chance; the model is not supported")


def own_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that make up a checkpoint: parameters and persistent buffers, tied ones once, by the name that
    transformers stores them under."""
    ties = getattr(model, "all_tied_weights_keys", {})
    found: dict[int, str] = {}
    tensors = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    stored = model.state_dict().keys()
    for name, tensor in tensors.items():
        if name in stored and (id(tensor) not in found or (found[id(tensor)] in ties and name not in ties)):
            found[id(tensor)] = name
    return {name: tensors[name] for name in found.values()}


def _set(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """In the place of a parameter or a buffer, whatever it was."""
    parent, _, short = name.rpartition(".")
    module = model.get_submodule(parent)
    if short in module._parameters:
        old = module._parameters[short]
        module._parameters[short] = nn.Parameter(tensor, requires_grad=old.requires_grad)
    else:
        module._buffers[short] = tensor
