"""The Hugging Face hub: is it there?"""

import functools

from huggingface_hub import constants, get_session

_PATIENCE_S = 5


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
