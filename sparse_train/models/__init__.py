"""Models: their families, and reading and writing them as folders.

    family.py, families/      what differs between architectures: blocks, prunable linears, attention
    build.py                  new models
    config.py, checkpoint.py  model folders: their config, their tensors
    gguf.py                   GGUF files, each converted to a model folder once
    names.py, older.py        names of tensors and keys as transformers 5 and 4 store them
    empty.py                  models without data
    processor.py              tokenizer, feature extractor and numbers of positions (positions.py)
    generation.py             the special tokens of a model
"""

from sparse_train.models.build import build_model, build_processor, describe
from sparse_train.models.checkpoint import (
    DTYPES,
    ModelFolder,
    check_on_hub,
    fetch,
    fill,
    load_model,
    model_of,
    open_model,
    save_model,
)
from sparse_train.models.config import (
    is_folder,
    is_gguf,
    packed_format,
    read_config,
    read_config_keys,
    reading,
)
from sparse_train.models.empty import empty_model, own_tensors
from sparse_train.models.families import family_of, family_of_type
from sparse_train.models.family import Family, Stack, block_output
from sparse_train.models.generation import model_tokens
from sparse_train.models.gguf import as_folder
from sparse_train.models.processor import Processor, load_processor

__all__ = [
    "DTYPES", "Family", "ModelFolder", "Processor", "Stack", "as_folder", "block_output", "build_model",
    "build_processor", "check_on_hub", "describe", "empty_model", "family_of", "family_of_type", "fetch", "fill",
    "is_folder", "is_gguf", "load_model", "load_processor", "model_of", "model_tokens", "open_model", "own_tensors",
    "packed_format", "read_config", "read_config_keys", "reading", "save_model",
]
