"""The Hugging Face hub: which names may be there, and whether it answers."""

import functools

from huggingface_hub import constants, get_safetensors_metadata, get_session, repo_exists
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

_PATIENCE_S = 5
_OF_FILES = (".bin", ".csv", ".gguf", ".gz", ".json", ".jsonl", ".safetensors", ".tsv", ".txt", ".xz", ".zip")


def may_be_hub_name(name: str) -> bool:
    """NAME or OWNER/NAME; anything else can only be a file or folder."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not name.endswith(_OF_FILES)


def has_data_set(name: str) -> bool | None:
    """None where the hub cannot tell."""
    if not hub_answers():
        return None
    try:
        return repo_exists(name, repo_type="dataset")
    except Exception:  # as below; it does answer, but not this
        return None


def tensors_on_hub(name: str) -> dict[str, tuple[tuple[int, ...], str]] | None:
    """Shape and dtype of each tensor of a model, from the headers of its model.safetensors; None where the hub cannot
    tell, as of what is only in the cache here."""
    if not hub_answers():
        return None
    try:
        files = get_safetensors_metadata(name).files_metadata.values()
    except Exception:  # as below; what is wrong is told when it is downloaded
        return None
    return {tensor: (tuple(info.shape), info.dtype) for file in files for tensor, info in file.tensors.items()}


@functools.cache
def hub_answers() -> bool:
    """Asked once per process. A hub that does not answer is not asked again, only its cache: huggingface_hub would try
    six times for each file, over half a minute."""
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE_S)
    except Exception:  # of whichever HTTP client huggingface_hub uses; a wrong status is an answer
        constants.HF_HUB_OFFLINE = True
    return not constants.HF_HUB_OFFLINE
