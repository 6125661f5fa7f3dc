"""What this package uses of transformers beyond its documented interface: a function each, and no other place.

tests/test_compat.py fails where a release changes one of them. Tested with transformers 5.23.0.
"""

import inspect
import re
import sys
from collections.abc import Iterable, Mapping, Set
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, cached_file

M = TypeVar("M", bound=PreTrainedModel)

_MASKS_OF_POSITIONS = re.compile(r'mask\w*\([^)]*\bposition_ids=position_ids|'
                                 r'mask_kwargs = {[^}]*"position_ids": position_ids')
"""In the source of a model: its positions go into its masks."""

natural_order = dot_natural_key
"""Sort key of tensor names, in which layer 2 comes before layer 10, as converters expect their inputs."""


def has_model(auto_class: Any, config: PretrainedConfig) -> bool:
    """Whether an Auto class, such as AutoModelForCausalLM, makes models of `config` (`_model_mapping`).

    Asked before from_config, whose error for a model type without that head lists every type that has it.
    """
    return type(config) in auto_class._model_mapping


def reset_implementations(config: PretrainedConfig) -> None:
    """Let transformers choose how attention and experts are computed (`_attn_implementation`,
    `_experts_implementation`), whatever the config that was read says: it may name a kernel to be downloaded."""
    config._attn_implementation = None
    config._experts_implementation = None


def has_usual_cache(model: PreTrainedModel) -> bool:
    """Whether a model generates from a Cache that `past_key_values` takes, rather than a kind of its own
    (`_supports_default_dynamic_cache`)."""
    return (model._supports_default_dynamic_cache()  # type: ignore[operator]
            and "past_key_values" in inspect.signature(model.forward).parameters)


def supports_attention_interface(model: PreTrainedModel) -> bool:
    """Whether attention can be replaced through AttentionInterface (`_supports_attention_backend`)."""
    return bool(getattr(model, "_supports_attention_backend", False))


def separates_sequences(model: PreTrainedModel) -> bool:
    """Whether position_ids that start at 0 again begin another sequence for all of `model`: it has attention alone, and
    transformers.masking_utils makes its masks from them (`_supports_attention_backend`, `_is_stateful`, its source).

    False as well for some models of which this cannot be told.
    """
    kinds = set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ())
    return (supports_attention_interface(model) and not model._is_stateful and not model.config.is_encoder_decoder
            and kinds <= {"full_attention", "sliding_attention"}
            and _MASKS_OF_POSITIONS.search(inspect.getsource(sys.modules[type(model).__module__])) is not None)


def mark_initialised(model: PreTrainedModel) -> None:
    """Tell `initialise_unmarked` to leave every tensor that `model` has now as it is (`_is_hf_initialized`)."""
    for tensor in [*model.parameters(), *model.buffers()]:
        setattr(tensor, "_is_hf_initialized", True)  # noqa: B010 - tensors do not declare it


def initialise_unmarked(model: PreTrainedModel) -> None:
    """Run the initialisation of `model` on the tensors that came after `mark_initialised`, as from_pretrained does for
    those that a checkpoint lacks (`_is_hf_initialized`, `_init_weights`)."""
    for module in model.modules():
        setattr(module, "_is_hf_initialized", False)  # noqa: B010 - modules do not declare it
    model.initialize_weights()


def drop_expected(model: PreTrainedModel, missing: Iterable[str],
                  unexpected: Iterable[str]) -> tuple[list[str], list[str]]:
    """(`missing`, `unexpected`) sorted, without the names that from_pretrained passes over for this type of model
    (`_adjust_missing_and_unexpected_keys`), such as tables of positions that older releases stored."""
    keys = SimpleNamespace(missing_keys=set(missing), unexpected_keys=set(unexpected))
    model._adjust_missing_and_unexpected_keys(keys)  # type: ignore[arg-type]
    return sorted(keys.missing_keys), sorted(keys.unexpected_keys)


def names_not_saved(model: PreTrainedModel) -> set[str]:
    """Tensors that save_pretrained leaves out, because each model of the type computes them
    (`_keys_to_ignore_on_save`)."""
    return set(model._keys_to_ignore_on_save or ())


@dataclass(frozen=True)
class Conversions:
    """How names and tensors of a checkpoint become those of a model, or the other way round."""
    renamings: list[WeightRenaming] = field(default_factory=list)
    converters: list[WeightConverter] = field(default_factory=list)

    def converter(self, pattern: str) -> WeightConverter:
        """The one with `pattern` among its sources, the last of several."""
        return next(converter for converter in reversed(self.converters) if pattern in converter.source_patterns)

    def load_name(self, stored: str, prefix: str, names: dict[str, Any]) -> tuple[str, str | None]:
        """(the name in a model that has `names`, the pattern by which a converter takes the tensor, or None).

        `prefix`, of the model without its head, is added or removed where that makes it one of `names`.
        """
        return rename_source_key(stored, self.renamings, self.converters, prefix, names)

    def save_name(self, name: str) -> str:
        return apply_renamings(name, self.renamings)

    def group(self, name: str) -> tuple[str, str | None]:
        """(what a converter calls the tensors that it takes together with `name`, the pattern), or (`name`, None)."""
        return apply_converters(name, self.converters)


def loading_conversions(model: PreTrainedModel) -> Conversions:
    """What from_pretrained applies to checkpoints of `model` (transformers.conversion_mapping)."""
    return _split(get_model_conversion_mapping(model))


def saving_conversions(model: PreTrainedModel) -> Conversions:
    """What save_pretrained applies to a model that was not made by from_pretrained: the reverse, without names of older
    releases and without the prefixes that some files have."""
    mapping = get_model_conversion_mapping(model, add_legacy=False)
    return _split([entry.reverse_transform() for entry in mapping[::-1] if not isinstance(entry, PrefixChange)])


def _split(mapping: Iterable[Any]) -> Conversions:
    entries = list(mapping)
    return Conversions([entry for entry in entries if isinstance(entry, WeightRenaming)],
                       [entry for entry in entries if isinstance(entry, WeightConverter)])


def convert(converter: WeightConverter, group: str, inputs: Mapping[str, list[torch.Tensor]], config: PretrainedConfig,
            parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name -> tensor that `converter` makes of `inputs`, by pattern, which are called `group` in the model.

    Without from_pretrained's loader: of the model, converters read `config`, and the shapes of its `parameters`.
    """
    converter = deepcopy(converter)  # it collects tensors
    for pattern, tensors in inputs.items():
        converter.collected_tensors[pattern] = tensors  # type: ignore[assignment]  # the loader has futures
    model = SimpleNamespace(config=config, get_parameter=parameters.__getitem__)
    results = converter.convert(group, model=model, config=config)
    return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in results.items()}


def load_generation_config(path: str | Path) -> GenerationConfig:
    """generation_config.json of a folder or hub name; without that file, what its config.json says (arguments of
    `cached_file` and `GenerationConfig.from_pretrained` that from_pretrained of a model uses)."""
    source: dict[str, Any] = {}
    if cached_file(path, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False,
                   _raise_exceptions_for_connection_errors=False) is None:
        source = {"config_file_name": CONFIG_NAME, "_from_model_config": True}
    return GenerationConfig.from_pretrained(path, **source)


def name_weights(config: PretrainedConfig, file: str) -> None:
    """Have from_pretrained with this `config` read `file`, in place of model.safetensors (`transformers_weights`)."""
    config.transformers_weights = file


def ignore_unexpected(model: PreTrainedModel, modules: Iterable[str]) -> None:
    """Let from_pretrained pass over what a checkpoint holds for `modules`, by their names in `model`
    (`_keys_to_ignore_on_load_unexpected`)."""
    ignored = model._keys_to_ignore_on_load_unexpected or ()
    model._keys_to_ignore_on_load_unexpected = {*ignored, *(rf"^{re.escape(name)}\." for name in modules)}


def untie(model: PreTrainedModel, names: Set[str]) -> None:
    """Have nothing tie the tensors `names` of `model` to others, when it is filled or at a later `tie_weights()`
    (`all_tied_weights_keys`, and `_tied_weights_keys` of each model in it)."""
    left = {tied: source for tied, source in model.all_tied_weights_keys.items() if not {tied, source} & names}
    model.all_tied_weights_keys = left
    for name, part in model.named_modules(remove_duplicate=False):
        if isinstance(part, PreTrainedModel):
            start = f"{name}." if name else ""
            part._tied_weights_keys = {tied.removeprefix(start): source.removeprefix(start)
                                       for tied, source in left.items()
                                       if tied.startswith(start) and source.startswith(start)}


def gguf_text_splits() -> Mapping[str, str]:
    """llama.cpp's names of the ways to split text that transformers knows in GGUF files with a tokenizer on bytes ->
    their regular expression (`GGUF_PRE_TOKENIZER_SPLITS`); all others it takes for GPT-2's."""
    return GGUF_PRE_TOKENIZER_SPLITS


def to_device(model: M, device: torch.device) -> M:
    """`model.to(device)`: transformers' own is wrapped so that type checkers take the device for the model."""
    return torch.nn.Module.to(model, device)
