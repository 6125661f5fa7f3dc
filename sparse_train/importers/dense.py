"""Dense checkpoints, of SparseGPT, Wanda, MaskLLM or any other code that leaves zeros in place, also as GGUF files."""

from collections.abc import Mapping
from typing import Any

from sparse_train.errors import UserError
from sparse_train.importers.importer import Importer, dtype_of
from sparse_train.models import is_gguf, load_processor, open_model, packed_format, read_config


class Dense(Importer):
    def __init__(self, source: str):
        self.model, self.folder = open_model(source, dtype_of(read_config(source)))
        if self.folder.shapes:
            raise UserError(f"{source} is a sparse folder of this package already; every command reads it as it is")
        self.processor = load_processor(source)

    @classmethod
    def recognises(cls, source: str, config: Mapping[str, Any]) -> bool:
        return not is_gguf(source) and packed_format(config) is None


class Gguf(Dense):
    """A GGUF file, which becomes a dense folder in the cache first (models/gguf.py)."""

    @classmethod
    def recognises(cls, source: str, config: Mapping[str, Any]) -> bool:
        return is_gguf(source)
