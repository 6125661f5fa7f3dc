"""Model families, and models as folders."""

from sparse_train.models.checkpoint import (
    build_model,
    load_model,
    load_tokenizer,
    open_model,
    own_tensors,
    read_config,
    save_model,
)
from sparse_train.models.family import Family, family_of

__all__ = [
    "Family", "build_model", "family_of", "load_model", "load_tokenizer", "open_model", "own_tensors",
    "read_config", "save_model",
]
