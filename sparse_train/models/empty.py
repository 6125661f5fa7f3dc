"""Models without data: parameters on the meta device, and the tensors that transformers computes, not reads."""

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
"""Entries of a computed tensor: a table of positions of the longest models has a tenth of it."""


def from_config(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model of `config` with the head that predicts text. Raises UserError where there is no such model."""
    reset_implementations(config)
    auto = family_of_type(config.model_type).auto_class(config)
    if not has_model(auto, config):
        raise UserError(f"{_source(config)}model type {config.model_type!r} has no head that predicts text from text, "
                        f"or from speech as whisper's, in transformers {__version__} ({auto.__name__}); give a model "
                        "that has one")
    try:
        return auto.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # whatever transformers and torch raise for a config of impossible sizes
        raise UserError(f"{_source(config)}no model that predicts text can be made of this {config.model_type} config: "
                        f"{first_line(error)}") from error


def _source(config: PretrainedConfig) -> str:
    """Prefix of a message: the folder that `config` was read from."""
    return f"{config.name_or_path}: " if config.name_or_path else ""


def empty_model(config: PretrainedConfig, dtype: torch.dtype = torch.float32,
                check: Callable[[PreTrainedModel], None] = lambda model: None) -> PreTrainedModel:
    """A model whose parameters and stored buffers have no data. Computed buffers, such as rotary frequencies, have.

    `check` is called with the model before anything is computed: its sizes are still those of an unchecked config.
    Raises UserError where there is no such model, and where a buffer is neither stored nor computed.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = from_config(config, dtype)
    # Some ignore the device's context (DiffLlama's), and a tensor that is not on meta would not be read later.
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
            raise UserError(f"{_source(model.config)}its config.json makes {name} of {count:,} numbers, more than any "
                            "model needs; give a folder that is not damaged")
    mark_initialised(model)
    runs = []
    for seed in (0, 1):  # from other values and other random numbers: only a computed tensor is the same twice
        for name in names:
            empty = model.get_parameter_or_buffer(name)
            _set(model, name, torch.full_like(empty, seed, device="cpu"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            initialise_unmarked(model)
        runs.append([model.get_parameter_or_buffer(name) for name in names])
    not_computed = [name for name, one, other in zip(names, *runs, strict=True) if not torch.equal(one, other)]
    if not_computed:
        raise UserError(f"{not_computed[0]} of a {model.config.model_type} model is not stored in checkpoints, and "
                        "transformers does not compute it either, so its values would be random; the model is not "
                        "supported")


def own_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that make up a checkpoint: parameters and persistent buffers, tied ones once, by the name that
    transformers stores them under."""
    ties = getattr(model, "all_tied_weights_keys", {})
    names: dict[int, str] = {}
    tensors = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    stored = model.state_dict().keys()
    for name, tensor in tensors.items():
        if name in stored and (id(tensor) not in names or (names[id(tensor)] in ties and name not in ties)):
            names[id(tensor)] = name
    return {name: tensors[name] for name in names.values()}


def _set(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Replace the parameter or buffer `name`."""
    parent, _, short = name.rpartition(".")
    module = model.get_submodule(parent)
    old = module._parameters.get(short)
    if old is not None:
        module._parameters[short] = nn.Parameter(tensor, requires_grad=old.requires_grad)
    else:
        module._buffers[short] = tensor
