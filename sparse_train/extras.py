"""Optional dependencies: a missing one is reported in one line, with what to install."""

import importlib.util

from sparse_train.errors import UserError

# As in pyproject.toml; each is imported under its own name.
EXTRAS = {
    "speech": ("jiwer", "soundfile", "soxr"),
    "translation": ("num2words", "sacrebleu"),
    "plots": ("matplotlib",),
    "wandb": ("wandb",),
    "gguf": ("gguf", "accelerate"),
    "cuda": ("triton",),
}


def require(extra: str) -> None:
    """Raises UserError where a package of `extra` is not installed. Imports none of them."""
    missing = [name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} not installed; pip install 'sparse-train[{extra}]'")
