"""Models as folders: config.json, tokenizer, tensors; dense in Hugging Face's layout, sparse in ours.

    open_model   config -> a model without data, checked against what the folder holds
    fill         its tensors, read; under ZeRO-3 each rank reads its own ranges instead

There is one way in, so that what one stage reads no other refuses. Nothing of a folder is unpickled or executed.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace

import torch
from huggingface_hub import snapshot_download
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from sparse_train.errors import UserError, first_line
from sparse_train.hub import hub_answers, tensors_on_hub
from sparse_train.models.config import is_folder, read_config, read_generation, reading
from sparse_train.models.empty import compute, empty_model, own_tensors
from sparse_train.models.names import Source, as_stored, match
from sparse_train.models.older import add_older_keys, with_head
from sparse_train.sparse import BitmaskTensor, TensorFolder, sparse_linears, sparsify, write_tensors

_DTYPES = ("F64", "F32", "BF16", "F16")
"""Of parameters, as safetensors names them; others hold codes of quantised weights."""


def load_model(path: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A dense model from a folder or hub name, or one with SparseLinears from a sparse folder; in eval mode.

    Raises UserError where tensors are missing, which would be random, silently, or left over, or of another shape.
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

    For who loads tensors in parts. A hub name is downloaded first. `quantised`: int8 values are welcome too. Raises
    UserError where the folder lacks a tensor of the model, holds one too many or one of another shape.
    """
    folder = ModelFolder(fetch(path))
    with reading(folder.folder, "a model"):
        model = empty_model(read_config(folder.folder), dtype, folder.match)
    model.generation_config = read_generation(folder.folder)
    for name, shape in folder.shapes.items():
        (num_values,), stored = folder.spec(f"{name}.values")
        if stored == "I8" and not quantised:
            raise UserError(f"{folder.folder}: {name} is quantised; it runs (sparse-train generate) but does not "
                            "train, so give the fp32 or bf16 folder here")
        bitmask = torch.empty(folder.spec(f"{name}.bitmask")[0], dtype=torch.uint8, device="meta")
        sparsify(model, {name: BitmaskTensor(torch.empty(num_values, dtype=dtype, device="meta"), bitmask, shape)})
    return model, folder


def fetch(path: str | Path) -> Path:
    """The folder itself, or that of a hub name, downloaded. Raises UserError where it has no weights that are read."""
    folder = Path(path)
    downloaded = not is_folder(path)
    if downloaded:
        answers = hub_answers()
        try:
            folder = Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors"]))
        except (OSError, ValueError) as error:
            cause = first_line(error) if answers else "the hub does not answer, and its cache does not hold it"
            raise UserError(f"cannot download {path}: {cause}; give a folder or a hub name") from error
    if any(folder.glob("*.gguf")) and not any(folder.glob("*.safetensors")):
        is_folder(next(folder.glob("*.gguf")))  # refuses it, with what to do
    if not any(folder.glob("*.safetensors")) and (downloaded or any(folder.glob("*.bin"))):
        raise UserError(f"{path} has no weights in safetensors; pickled ones (*.bin) can execute code and are not "
                        "read: where you trust them, convert them by transformers' from_pretrained and save_pretrained")
    return folder


class ModelFolder(TensorFolder):
    """A checkpoint's tensors under the names that its model gives them, whatever they are stored under."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._sources: dict[str, Source] = {}

    def get(self, name: str) -> torch.Tensor:
        return self._read(self._sources.get(name, Source(name)))

    def get_range(self, name: str, start: int, stop: int) -> torch.Tensor:
        """As in TensorFolder; what a conversion makes is made whole, and cut."""
        source = self._sources.get(name, Source(name))
        if source.conversion is None:
            return super().get_range(source.name, start, stop)
        return self.get(name).flatten()[start:stop].clone()

    def match(self, model: PreTrainedModel) -> None:
        """Find each tensor of the dense `model`; raises UserError where one is missing, left over or of another shape.
        """
        def same(one: Source, other: Source) -> bool:
            return torch.equal(self._read(one), self._read(other))
        self._sources = match_tensors(model, {name: self.spec(name) for name in self.names}, self.folder, self.shapes,
                                      same)

    def _read(self, source: Source) -> torch.Tensor:
        if source.conversion is None:
            return super().get(source.name)
        return source.conversion.apply(super().get)[source.name]


def match_tensors(model: PreTrainedModel, specs: Mapping[str, tuple[tuple[int, ...], str]], where: str | Path,
                  sparse: Mapping[str, tuple[int, ...]], same: Callable[[Source, Source], bool]) -> dict[str, Source]:
    """Where each tensor of the dense `model` comes from, of a checkpoint that holds `specs` (shape and dtype by name)
    and the `sparse` weights (module name -> shape). Raises UserError where one is missing, left over or of another
    shape.

    transformers' rules for published checkpoints hold: names are converted as from_pretrained does, a tied tensor may
    go by either name, some tensors are computed where they are missing, and some names of old may be left over. What a
    model ties but a checkpoint holds apart is untied. A sparse checkpoint has the model's own names.
    """
    kind = f"a {model.config.model_type} model"
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    sources, found = match(model, {name: shape for name, (shape, _) in specs.items()}, not sparse)
    for name, source in sources.items():
        stored = specs[source.name if source.conversion is None else source.conversion.names()[0]][1]
        if name in parameters and stored not in _DTYPES:
            raise UserError(f"{where}: {name} is stored as {stored}, so the checkpoint is quantised; give the one that "
                            "it was made from, in fp32, bf16 or fp16")
    _match_ties(model, sources, found, same)
    found |= {f"{name}.weight": shape for name, shape in sparse.items()}
    absent = own_tensors(model).keys() - found.keys()
    odd = SimpleNamespace(missing_keys=set(absent), unexpected_keys=found.keys() - expected.keys())
    model._adjust_missing_and_unexpected_keys(odd)  # transformers' own lists of exceptions
    missing, left = sorted(odd.missing_keys), sorted(odd.unexpected_keys)
    if missing:
        raise UserError(f"{where} lacks {len(missing)} tensors of {kind}, such as {missing[0]}; the checkpoint is not "
                        "complete")
    if left:
        raise UserError(f"{where} holds {len(left)} tensors that {kind} does not have, such as {left[0]}; its "
                        "config.json belongs to another model")
    for name in own_tensors(model):
        if name not in absent and found[name] != expected[name]:
            raise UserError(f"{where}: {name} has shape {found[name]}, but {expected[name]} in {kind} of its "
                            "config.json, which belongs to another model")
    compute(model, absent)
    return sources


def _match_ties(model: PreTrainedModel, sources: dict[str, Source], found: dict[str, tuple[int, ...]],
                same: Callable[[Source, Source], bool]) -> None:
    ties = model.all_tied_weights_keys
    for target, source in list(ties.items()):
        if {target, source} <= sources.keys() and not same(sources[target], sources[source]):
            # T5 v1.1: its config cannot say that the head is not the embedding.
            del ties[target]
            parent, _, short = target.rpartition(".")
            setattr(model.get_submodule(parent), short, nn.Parameter(torch.empty_like(model.get_parameter(target))))
    for names in (ties.items(), ((source, target) for target, source in ties.items())):
        for here, other in names:
            if here in sources:
                sources.setdefault(other, sources[here])
                found.setdefault(other, found[here])


def check_on_hub(name: str, config: PretrainedConfig) -> None:
    """Raises UserError for what names and shapes tell of a model on the hub, before its weights are downloaded."""
    specs = tensors_on_hub(name)
    if specs is not None:
        match_tensors(empty_model(config), specs, name, {}, lambda one, other: True)


def fill(model: PreTrainedModel, folder: ModelFolder) -> None:
    """Read what has no data yet, into the dtype that it is to have."""
    model.load_state_dict({name: folder.get(name).to(empty.dtype) for name, empty in own_tensors(model).items()
                           if empty.is_meta}, strict=False, assign=True)
    left = {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.is_meta}
    model.tie_weights(missing_keys=left, recompute_mapping=False)


def save_model(folder: Path, model: PreTrainedModel, processor,
               tensors: Iterable[tuple[str, torch.Tensor]] | None = None) -> None:
    """Write config, processor and tensors of `model`; a model with SparseLinears is stored compressed.

    `processor` is a Processor or a tokenizer. `tensors` (name, tensor) replaces the model's own, for models whose
    parameters are partitioned over ranks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)
    add_older_keys(folder)
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in sparse_linears(model).items()}
    own = own_tensors(model)
    named = own.items() if tensors is None else tensors
    write_tensors(folder, named if shapes else with_head(model, as_stored(model, named, own)), shapes)
