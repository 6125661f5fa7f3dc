"""Names in a checkpoint and names in the model: transformers' own conversions, in both directions.

    match       names and shapes of a file -> where each tensor of the model comes from
    as_stored   tensors of the model -> tensors as save_pretrained writes them

Most are renamings (GPT-NeoX has `embed_out` in the file, `lm_head` in the model); some compute, such as that of experts
that lie one by one in the file and fused in the model. What a conversion makes of shapes is found on the meta device,
so a checkpoint is checked before anything of it is read.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from transformers import PreTrainedModel
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

from sparse_train.errors import UserError


@dataclass(frozen=True)
class Conversion:
    """One application of a converter: several tensors in, several out."""
    converter: WeightConverter
    first: str
    """The name that all of its inputs are renamed to."""
    inputs: dict[str, list[str]]
    """Source pattern -> names, in the order in which the converter takes them."""
    model: SimpleNamespace
    """What converters ask of a model: its config, and parameters by name for their shapes."""

    def names(self) -> list[str]:
        return [name for names in self.inputs.values() for name in names]

    def apply(self, get: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        converter = deepcopy(self.converter)
        for pattern, names in self.inputs.items():
            converter.collected_tensors[pattern] = [get(name) for name in names]
        made = converter.convert(self.first, model=self.model, config=self.model.config)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()}


@dataclass(frozen=True)
class Source:
    """Where a tensor of the model comes from: a stored one as it is, or what a conversion makes of several."""
    name: str
    """Stored, or among the conversion's results."""
    conversion: Conversion | None = None


def match(model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]],
          convert: bool = True) -> tuple[dict[str, Source], dict[str, tuple[int, ...]]]:
    """(tensor of `model` or left-over name -> source, the same names -> shape) of a checkpoint that holds `shapes`.

    Follows from_pretrained: renamings, then at most one converter, then the prefix of a model without its head, which
    may be there or not. `convert=False`: of these only the prefix. Raises UserError where a conversion does not fit.
    """
    expected = model.state_dict()
    renamings, converters = _split(get_model_conversion_mapping(model)) if convert else ([], [])
    prefix, asked = model.base_model_prefix, _asked(model)
    inputs: dict[str, dict[str, list[str]]] = {}
    sources, found = {}, {}
    for stored in sorted(shapes, key=dot_natural_key):
        name, pattern = rename_source_key(stored, renamings, converters, prefix, expected)
        if name not in expected and stored in expected:
            name, pattern = stored, None
        if name in expected and pattern is not None:
            inputs.setdefault(name, defaultdict(list))[pattern].append(stored)
        else:
            if name not in expected or name in sources:
                name = stored
            sources[name], found[name] = Source(stored), shapes[stored]
    pattern_to_converter = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    for first, of_pattern in inputs.items():
        conversion = Conversion(pattern_to_converter[next(iter(of_pattern))], first, dict(of_pattern), asked)
        try:
            made = conversion.apply(lambda stored: torch.empty(shapes[stored], device="meta"))
        except Exception as error:  # whatever torch says of shapes that do not go together
            names = conversion.names()
            raise UserError(f"{len(names)} tensors of the checkpoint, such as {names[0]}, do not make up {first} of a "
                            f"{model.config.model_type} model; the checkpoint is not complete, or its config.json "
                            "belongs to another model") from error
        for name, tensor in made.items():
            sources[name], found[name] = Source(name, conversion), tuple(tensor.shape)
    return sources, found


def as_stored(model: PreTrainedModel, tensors: Iterable[tuple[str, torch.Tensor]],
           names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """`tensors` (name in `model`, tensor), of all `names`, under the names and in the layout of save_pretrained,
    which leaves out what every model of the type computes.

    One after the other: what is held back is the inputs of conversions that are not complete yet.
    """
    # As in transformers for a model that was not made by from_pretrained: prefixes that some files have are not added.
    mapping = [c for c in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(c, PrefixChange)]
    renamings, converters = _split([conversion.reverse_transform() for conversion in mapping[::-1]])
    pattern_to_converter = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    conversions, asked = {}, _asked(model)
    direct, of_input = {}, {}
    for name in sorted(names, key=dot_natural_key):
        first, pattern = apply_converters(name, converters)
        if pattern is None:
            direct[name] = apply_renamings(name, renamings)
        else:
            made = conversions.setdefault(first, Conversion(pattern_to_converter[pattern], first, {}, asked))
            made.inputs.setdefault(pattern, []).append(name)
            of_input[name] = made
    waiting: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        if name in model._keys_to_ignore_on_save:
            continue
        if name in direct:
            yield direct[name], tensor
            continue
        waiting[name], conversion = tensor, of_input[name]
        if waiting.keys() >= set(conversion.names()):
            for made, result in conversion.apply(waiting.pop).items():
                yield apply_renamings(made, renamings), result


def _split(mapping: list) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    return tuple([entry for entry in mapping if isinstance(entry, kind)] for kind in (WeightRenaming, WeightConverter))


def _asked(model: PreTrainedModel) -> SimpleNamespace:
    """Shapes as they are now: layers may be replaced and parameters partitioned later."""
    empty = {name: torch.empty_like(tensor, device="meta") for name, tensor in model.state_dict().items()}
    return SimpleNamespace(config=model.config, get_parameter=empty.__getitem__)
