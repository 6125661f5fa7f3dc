"""Names in a checkpoint and names in the model: transformers' own conversions, in both directions.

    match       names and shapes of a file -> where each tensor of the model comes from
    as_stored   tensors of the model -> tensors as save_pretrained writes them

Most are renamings (GPT-NeoX has `embed_out` in the file, `lm_head` in the model); some compute, such as that of experts
that are stored one by one and fused in the model. The results' shapes are computed on the meta device, so a checkpoint
is checked before anything of it is read.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel

from sparse_train.compat.transformers import (
    Conversions,
    WeightConverter,
    convert,
    loading_conversions,
    names_not_saved,
    natural_order,
    saving_conversions,
)
from sparse_train.errors import UserError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Conversion:
    """One application of a converter: several tensors in, several out."""
    converter: WeightConverter
    group: str
    """The name that all of its inputs are renamed to."""
    inputs: dict[str, list[str]]
    """Source pattern -> names, in the order in which the converter takes them."""
    config: PretrainedConfig
    parameters: Mapping[str, torch.Tensor]
    """The model's, without data."""

    def names(self) -> list[str]:
        return [name for names in self.inputs.values() for name in names]

    def apply(self, get: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        inputs = {pattern: [get(name) for name in names] for pattern, names in self.inputs.items()}
        return convert(self.converter, self.group, inputs, self.config, self.parameters)


@dataclass(frozen=True)
class Source:
    """Where a tensor of the model comes from: a stored one as it is, or the result of a conversion of several."""
    name: str
    """Stored, or among the conversion's results."""
    conversion: Conversion | None = None


@dataclass(frozen=True)
class Match:
    """What a checkpoint has for a model, by the name in the model, or as stored where the model has no such tensor."""
    sources: dict[str, Source]
    shapes: dict[str, Shape]


def match(model: PreTrainedModel, shapes: Mapping[str, Shape], converted: bool = True) -> Match:
    """Match a checkpoint with tensors of `shapes` to `model`.

    Follows from_pretrained: renamings, then at most one converter, then the prefix of a model without its head, which
    may be there or not. `converted=False`: the checkpoint has the model's own names, but for the prefix. Raises
    UserError where a conversion does not fit.
    """
    expected, parameters = model.state_dict(), _without_data(model)
    conversions = loading_conversions(model) if converted else Conversions()
    groups: dict[str, dict[str, list[str]]] = {}
    result = Match({}, {})
    for stored in sorted(shapes, key=natural_order):
        name, pattern = conversions.load_name(stored, model.base_model_prefix, expected)
        if name not in expected and stored in expected:
            name, pattern = stored, None
        if name in expected and pattern is not None:
            groups.setdefault(name, defaultdict(list))[pattern].append(stored)
            continue
        if name not in expected or name in result.sources:
            name = stored
        result.sources[name], result.shapes[name] = Source(stored), shapes[stored]
    for group, inputs in groups.items():
        converter = conversions.converter(next(iter(inputs)))
        conversion = Conversion(converter, group, dict(inputs), model.config, parameters)
        for name, shape in _result_shapes(conversion, shapes).items():
            result.sources[name], result.shapes[name] = Source(name, conversion), shape
    return result


def _result_shapes(conversion: Conversion, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    try:
        results = conversion.apply(lambda stored: torch.empty(shapes[stored], device="meta"))
    except Exception as error:  # whatever torch raises for shapes that do not go together
        names, model_type = conversion.names(), conversion.config.model_type
        raise UserError(f"{len(names)} tensors of the checkpoint, such as {names[0]}, do not make up "
                        f"{conversion.group} of a {model_type} model; the checkpoint is not complete, or its "
                        "config.json belongs to another model") from error
    return {name: tuple(tensor.shape) for name, tensor in results.items()}


def as_stored(model: PreTrainedModel, tensors: Iterable[tuple[str, torch.Tensor]],
              names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """`tensors` (name in `model`, tensor), of all `names`, under the names and in the layout of save_pretrained,
    which leaves out what every model of the type computes.

    A generator: it keeps only the inputs of conversions that are not complete yet.
    """
    conversions, parameters, not_saved = saving_conversions(model), _without_data(model), names_not_saved(model)
    by_group: dict[str, Conversion] = {}
    by_input: dict[str, Conversion] = {}
    for name in sorted(names, key=natural_order):
        group, pattern = conversions.group(name)
        if pattern is not None:
            empty = Conversion(conversions.converter(pattern), group, {}, model.config, parameters)
            by_input[name] = by_group.setdefault(group, empty)
            by_input[name].inputs.setdefault(pattern, []).append(name)
    waiting: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        if name in not_saved:
            continue
        if name not in by_input:
            yield conversions.save_name(name), tensor
            continue
        waiting[name], conversion = tensor, by_input[name]
        if waiting.keys() >= set(conversion.names()):
            for result, converted in conversion.apply(waiting.pop).items():
                yield conversions.save_name(result), converted


def _without_data(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameters as they are now: layers may be replaced and parameters partitioned later."""
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in model.state_dict().items()}
