"""The Hugging Face hub: which names may be there, and whether it answers."""

import functools

from huggingface_hub import constants, get_safetensors_metadata, get_session, repo_exists
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

_TIMEOUT_S = 5
_FILE_SUFFIXES = (".bin", ".csv", ".gguf", ".gz", ".json", ".jsonl", ".safetensors", ".tsv", ".txt", ".xz", ".zip")


def may_be_hub_name(name: str) -> bool:
    """Whether `name` is NAME or OWNER/NAME; anything else can only be a file or folder."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not name.endswith(_FILE_SUFFIXES)


def has_data_set(name: str) -> bool | None:
    """Whether the hub has a data set of this name; None where it does not answer."""
    if not hub_answers():
        return None
    try:
        return repo_exists(name, repo_type="dataset")
    except Exception:  # as in hub_answers; it answers other requests, but not this one
        return None


def tensors_on_hub(name: str) -> dict[str, tuple[tuple[int, ...], str]] | None:
    """Shape and dtype of each tensor of a model, from the headers of its model.safetensors; None where they cannot be
    fetched, also where only the local cache has the model."""
    if not hub_answers():
        return None
    try:
        files = get_safetensors_metadata(name).files_metadata.values()
    except Exception:  # as in hub_answers; the download reports what is wrong
        return None
    return {tensor: (tuple(info.shape), info.dtype) for file in files for tensor, info in file.tensors.items()}


@functools.cache
def hub_answers() -> bool:
    """Whether the hub can be reached; checked once per process.

    Where it cannot, huggingface_hub is set to its offline mode, which reads the cache alone: it would otherwise try six
    times for each file, for over half a minute.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT_S)
    except Exception:  # of whichever HTTP client huggingface_hub uses; a wrong status is an answer
        constants.HF_HUB_OFFLINE = True
    return not constants.HF_HUB_OFFLINE
