"""Models as folders: config.json, tokenizer, tensors; dense in Hugging Face's layout, sparse in ours.

    open_model   config -> a model without data, checked against what the folder holds
    fill         its tensors, read; under ZeRO-3 each rank reads its own ranges instead

This is the only way in, so all stages accept the same folders. Nothing of a folder is unpickled or executed.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from sparse_train.compat.transformers import drop_expected
from sparse_train.errors import UserError, first_line
from sparse_train.hub import hub_answers, tensors_on_hub
from sparse_train.models.config import is_folder, read_config, read_generation, reading
from sparse_train.models.empty import compute, empty_model, own_tensors
from sparse_train.models.gguf import as_folder
from sparse_train.models.names import Match, Shape, Source, as_stored, match
from sparse_train.models.older import add_older_keys, with_head
from sparse_train.models.processor import Processor
from sparse_train.sparse import (
    BitmaskTensor,
    PackedEmbedding,
    PackedLinear,
    TensorFolder,
    sparse_linears,
    sparsify,
    write_sparse,
    write_tensors,
)
from sparse_train.sparse.header import QUANTISED

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""By the name that the config has for a precision."""
_PARAMETER_DTYPES = ("F64", "F32", "BF16", "F16")
"""Of parameters, as safetensors names them; others hold codes of quantised weights."""
Specs = Mapping[str, tuple[Shape, str]]
"""Tensor name -> shape and dtype."""


def load_model(path: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A dense model from a folder or hub name, or one with SparseLinears from a sparse folder; in eval mode.

    Raises UserError where a tensor is missing, which transformers would fill at random, unexpected or of another shape.
    """
    model, folder = open_model(path, dtype)
    for name, shape in folder.shapes.items():
        weight = folder.weight(name)  # checks its bits against its values
        sparsify(model, {name: BitmaskTensor(weight.values.to(dtype), weight.bitmask, shape)})
    fill(model, folder)
    return model.eval()


def open_model(path: str | Path, dtype: torch.dtype = torch.float32,
               quantised: bool = False) -> tuple[PreTrainedModel, "ModelFolder"]:
    """A model without data (meta device), dense or with SparseLinears, and the folder to read its tensors from.

    For callers that load tensors piecewise. A hub name is downloaded first, a GGUF file converted. `quantised`: also
    accept int8 and int4 values.
    Raises UserError where the folder lacks a tensor of the model, holds one too many or one of another shape.
    """
    folder = ModelFolder(fetch(path))
    model = model_of(folder, read_config(folder.folder), dtype)
    for name, shape in folder.shapes.items():
        (num_values,), stored = folder.spec(f"{name}.values")  # of codes of four bits, their bytes
        if stored in QUANTISED and not quantised:
            raise UserError(f"{folder.folder}: {name} is quantised; it runs (sparse-train generate) but does not "
                            "train, so give the fp32 or bf16 folder here")
        bitmask = torch.empty(folder.spec(f"{name}.bitmask")[0], dtype=torch.uint8, device="meta")
        sparsify(model, {name: BitmaskTensor(torch.empty(num_values, dtype=dtype, device="meta"), bitmask, shape)})
        model.all_tied_weights_keys.pop(f"{name}.weight", None)  # a quantised head is no longer the embedding
    return model, folder


def model_of(folder: "ModelFolder", config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The dense model of `config` without data, whose tensors `folder` has been found to hold. Raises UserError."""
    with reading(folder.folder, "a model"):
        model = empty_model(config, dtype, folder.match)
    model.generation_config = read_generation(folder.folder)
    return model


def fetch(path: str | Path) -> Path:
    """The folder itself, or that of a hub name, downloaded, or of a GGUF file, converted. Raises UserError where it has
    no weights in safetensors."""
    path = as_folder(path)
    folder = Path(path)
    downloaded = not is_folder(path)
    if downloaded:
        answers = hub_answers()
        try:
            folder = Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors"]))
        except (OSError, ValueError) as error:
            cause = first_line(error) if answers else "the hub does not answer, and its cache does not hold it"
            raise UserError(f"cannot download {path}: {cause}; give a folder or a hub name") from error
    if not any(folder.glob("*.safetensors")) and (files := sorted(folder.glob("*.gguf"))):
        raise UserError(f"{path} holds a GGUF file and no safetensors; give the path of that file: {files[0]}")
    if not any(folder.glob("*.safetensors")) and (downloaded or any(folder.glob("*.bin"))):
        raise UserError(f"{path} has no weights in safetensors; pickled ones (*.bin) can execute code and are not "
                        "read: where you trust them, convert them by transformers' from_pretrained and save_pretrained")
    return folder


class ModelFolder(TensorFolder):
    """A checkpoint's tensors under their names in the model, whatever names they are stored under."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._sources: dict[str, Source] = {}

    def get(self, name: str) -> torch.Tensor:
        return self._read(self._sources.get(name, Source(name)))

    def spec(self, name: str) -> tuple[Shape, str]:
        source = self._sources.get(name, Source(name))
        return super().spec(name if source.conversion else source.name)

    def get_range(self, name: str, start: int, stop: int) -> torch.Tensor:
        """As in TensorFolder; a conversion's result is computed whole, and cut."""
        source = self._sources.get(name, Source(name))
        if source.conversion is None:
            return super().get_range(source.name, start, stop)
        return self.get(name).flatten()[start:stop].clone()

    def match(self, model: PreTrainedModel) -> None:
        """Find each tensor of the dense `model`. Raises UserError where one is missing, unexpected or misshapen."""
        def same(one: Source, other: Source) -> bool:
            return torch.equal(self._read(one), self._read(other))
        self._sources = match_tensors(model, {name: self.spec(name) for name in self.names}, self.folder, self.shapes,
                                      same)

    def _read(self, source: Source) -> torch.Tensor:
        if source.conversion is None:
            return super().get(source.name)
        return source.conversion.apply(super().get)[source.name]


def match_tensors(model: PreTrainedModel, specs: Specs, where: str | Path, sparse: Mapping[str, Shape],
                  same: Callable[[Source, Source], bool]) -> dict[str, Source]:
    """Where each tensor of the dense `model` comes from, of a checkpoint that holds `specs` (shape and dtype by name)
    and the `sparse` weights (module name -> shape). Raises UserError where one is missing, unexpected or misshapen.

    transformers' rules for published checkpoints hold: names are converted as from_pretrained does, a tied tensor may
    go by either name, some tensors are computed where they are missing, and some names of older releases may be there
    as well. Two tensors that the model ties and that differ in the checkpoint are untied; `same` compares them. A
    sparse checkpoint has the model's own names.
    """
    matched = match(model, {name: shape for name, (shape, _) in specs.items()}, not sparse)
    _check_dtypes(model, matched, specs, where)
    _match_ties(model, matched, same)
    shapes = matched.shapes | {f"{name}.weight": shape for name, shape in sparse.items()}
    absent = own_tensors(model).keys() - shapes.keys()
    _check_complete(model, absent, shapes, where)
    _check_shapes(model, shapes, where)
    compute(model, absent)
    return matched.sources


def _check_dtypes(model: PreTrainedModel, matched: Match, specs: Specs, where: str | Path) -> None:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, source in matched.sources.items():
        _, stored = specs[source.name if source.conversion is None else source.conversion.names()[0]]
        if name in parameters and stored not in _PARAMETER_DTYPES:
            raise UserError(f"{where}: {name} is stored as {stored}, so the checkpoint is quantised; give the one that "
                            "it was made from, in fp32, bf16 or fp16")


def _match_ties(model: PreTrainedModel, matched: Match, same: Callable[[Source, Source], bool]) -> None:
    """Untie what the checkpoint has apart, and give the other name of a tied tensor the same source."""
    ties, sources, shapes = model.all_tied_weights_keys, matched.sources, matched.shapes
    for target, source in list(ties.items()):
        if {target, source} <= sources.keys() and not same(sources[target], sources[source]):
            # T5 v1.1: its config cannot say that the head is not the embedding.
            del ties[target]
            parent, _, short = target.rpartition(".")
            setattr(model.get_submodule(parent), short, nn.Parameter(torch.empty_like(model.get_parameter(target))))
    for name, alias in [*ties.items(), *((source, target) for target, source in ties.items())]:
        if name in sources:
            sources.setdefault(alias, sources[name])
            shapes.setdefault(alias, shapes[name])


def _check_complete(model: PreTrainedModel, absent: Iterable[str], stored: Iterable[str], where: str | Path) -> None:
    kind = f"a {model.config.model_type} model"
    missing, unexpected = drop_expected(model, absent, set(stored) - model.state_dict().keys())
    if missing:
        raise UserError(f"{where} lacks {len(missing)} tensors of {kind}, such as {missing[0]}; the checkpoint is not "
                        "complete")
    if unexpected:
        raise UserError(f"{where} holds {len(unexpected)} tensors that {kind} does not have, such as {unexpected[0]}; "
                        "its config.json belongs to another model")


def _check_shapes(model: PreTrainedModel, stored: Mapping[str, Shape], where: str | Path) -> None:
    for name, tensor in own_tensors(model).items():
        if name in stored and stored[name] != tuple(tensor.shape):
            raise UserError(f"{where}: {name} has shape {stored[name]}, but {tuple(tensor.shape)} in a "
                            f"{model.config.model_type} model of its config.json, which belongs to another model")


def check_on_hub(name: str, config: PretrainedConfig) -> None:
    """Raises UserError for a model on the hub whose names and shapes are wrong, before its weights are downloaded."""
    specs = tensors_on_hub(name)
    if specs is not None:
        match_tensors(empty_model(config), specs, name, {}, lambda one, other: True)


def fill(model: PreTrainedModel, folder: ModelFolder) -> None:
    """Read the tensors of `model` that have no data yet, in their dtype."""
    model.load_state_dict({name: folder.get(name).to(tensor.dtype) for name, tensor in own_tensors(model).items()
                           if tensor.is_meta}, strict=False, assign=True)
    empty = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.is_meta}
    model.tie_weights(missing_keys=empty, recompute_mapping=False)


def save_model(folder: Path, model: PreTrainedModel, processor: Processor | PreTrainedTokenizerBase,
               tensors: Iterable[tuple[str, torch.Tensor]] | None = None) -> None:
    """Write config, processor and tensors of `model`; a model with SparseLinears is stored compressed.

    `tensors` (name, tensor) replaces the model's own, for models whose parameters are partitioned over ranks. Raises
    UserError for a model with packed weights.
    """
    if any(isinstance(module, (PackedLinear, PackedEmbedding)) for module in model.modules()):
        raise UserError("a model with packed weights is written by its save_pretrained, which copies the files that "
                        "they were read from")
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]  # by which servers choose their code
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)
    add_older_keys(folder)
    own = own_tensors(model)
    named = own.items() if tensors is None else tensors
    if sparse_linears(model):
        write_sparse(folder, model, named)
    else:
        write_tensors(folder, with_head(model, as_stored(model, named, own)), {})
