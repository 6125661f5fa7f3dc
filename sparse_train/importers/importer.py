"""An importer reads one kind of checkpoint: which sources it takes, and each linear's weight as values and bits."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from sparse_train.errors import UserError
from sparse_train.models import ModelFolder, Processor, read_config_keys, reading
from sparse_train.registry import IMPORTERS
from sparse_train.sparse import BitmaskTensor


class Importer(ABC):
    """A source, opened. Nothing but names, shapes and the config has been read."""
    model: PreTrainedModel
    """Dense and without data, in the dtype that the source's config names."""
    folder: ModelFolder
    """The tensors of `model` by their names in it."""
    processor: Processor
    has_bits = False
    """Whether the source says which weights are pruned; else each that is 0.0 counts as pruned."""

    @abstractmethod
    def __init__(self, source: str):
        """Raises UserError where `source` is not complete, or of a kind that cannot be read."""

    @classmethod
    @abstractmethod
    def recognises(cls, source: str, config: Mapping[str, Any]) -> bool:
        """Whether this importer reads `source`: a folder, hub name or GGUF file, with its config.json or header."""

    def weight(self, linear: str) -> BitmaskTensor:
        """Of a linear of `model`, by its module name; on the CPU, in the dtype that it is stored in."""
        return BitmaskTensor.from_dense(self.folder.get(f"{linear}.weight"))


def dtype_of(config: PretrainedConfig) -> torch.dtype:
    """That a config names for its model; fp32 where it names none."""
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def open_source(source: str, name: str | None = None) -> tuple[str, Importer]:
    """(the name of the importer that reads `source`, the opened source); `name` chooses one of several.

    Raises UserError where none or several read it, or not the one of that name, and where it cannot be opened.
    """
    with reading(source, "a model config", "give a folder with config.json, a hub name or a GGUF file"):
        config = read_config_keys(source)
    names = [importer for importer in IMPORTERS.entries if IMPORTERS.load(importer).recognises(source, config)]
    if name is not None and name not in names:
        raise UserError(f"--from {name}: {source} is not of that kind; leave --from out")
    if name is None and len(names) != 1:
        raise UserError(f"{source} can be read as {' and as '.join(names) or 'nothing'}; choose one of them by --from")
    found = name or names[0]
    return found, IMPORTERS.load(found)(source)
