"""The Hugging Face hub: which names may be there, whether it answers, and uploading to it."""

import functools
import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    constants,
    get_safetensors_metadata,
    get_session,
    get_token,
    repo_exists,
)
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from sparse_train.errors import UserError, first_line

_TIMEOUT_S = 5
_WEIGHTS = re.compile(r"[\w-]+\.safetensors(\.index\.json)?")
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


def license_of(model: str) -> str | None:
    """The licence that the card of a model names, on the hub or in its folder; None where nothing tells."""
    card = Path(model) / "README.md"
    try:
        if card.is_file():
            data = ModelCard.load(card, ignore_metadata_errors=True).data
        elif may_be_hub_name(model) and hub_answers():
            data = HfApi(endpoint=constants.ENDPOINT).model_info(model).card_data
        else:
            return None
    except Exception:  # as in hub_answers; and a card may hold anything
        return None
    named = data and data.get("license")
    return named if isinstance(named, str) else None


def push(repo: str, files: Mapping[str, Path | bytes], tag: str, private: bool) -> str:
    """Upload `files`, by their names there, to the model `repo` in one commit; its address.

    A model that is there already is updated where its card has `tag`, or where it is empty; its weights that are not
    among `files` are deleted. Raises UserError where it is someone's other model, where it cannot be written, where
    there is no token and where the hub does not answer.
    """
    if get_token() is None:
        raise UserError("there is no token for the hub; log in (hf auth login), or set HF_TOKEN")
    if not hub_answers():
        raise UserError(f"{constants.ENDPOINT} does not answer, or HF_HUB_OFFLINE is set; push again from where it can "
                        "be reached")
    api = HfApi(endpoint=constants.ENDPOINT)
    try:
        stale = _own_weights(api, repo, tag, private) - files.keys()
        api.create_commit(repo, [*(CommitOperationAdd(name, content) for name, content in files.items()),
                                 *map(CommitOperationDelete, sorted(stale))], commit_message="Upload by sparse-train")
    except HfHubHTTPError as error:
        status = error.response.status_code
        cause = {401: "the token is not valid; log in again (hf auth login)",
                 403: f"the token may not write there; give one that may, or another owner than "
                      f"{repo.partition('/')[0]}"}.get(status, f"{first_line(error)}; try again")
        raise UserError(f"{repo} is not uploaded: {cause}") from error
    except UserError:
        raise
    except Exception as error:  # as in hub_answers
        raise UserError(f"{repo} is not uploaded: {first_line(error)}; try again") from error
    return f"{constants.ENDPOINT}/{repo}"


def _own_weights(api: HfApi, repo: str, tag: str, private: bool) -> set[str]:
    """Files of weights that `repo` has, which is made where there is none. Raises UserError where it is not ours."""
    try:
        info = api.model_info(repo)
    except RepositoryNotFoundError:
        api.create_repo(repo, private=private)
        return set()
    names = {file.rfilename for file in info.siblings or ()}
    tags = info.card_data and info.card_data.get("tags")
    if names - {".gitattributes"} and tag not in (tags or ()):
        raise UserError(f"{repo} exists and was not uploaded by sparse-train (its card has no tag {tag}); give another "
                        "name")
    if private and not info.private:
        raise UserError(f"{repo} exists and is public; change that in its settings, or leave out --private")
    return {name for name in names if _WEIGHTS.fullmatch(name)}
