"""What can be known to fail is said before the first job starts."""

from pathlib import Path

from sparse_train.config import RunConfig
from sparse_train.errors import UserError


def check(config: RunConfig) -> None:
    """Raises UserError: missing data, a folder that is no checkpoint, N:M that does not divide a width."""
    from sparse_train.models import read_config
    from sparse_train.pruning import check_pattern
    from sparse_train.sparse import TensorFolder
    from sparse_train.tasks import build_task

    build_task(config.task)
    path = config.dense.path or config.model.path
    if path is None:
        widths = [("d_model", config.model.d_model), ("the FFN", 4 * config.model.d_model)]
    else:
        if _looks_local(path):
            TensorFolder(Path(path))
        model = read_config(path)
        widths = [("d_model", model.hidden_size), ("the FFN", model.hidden_size * getattr(model, "expansion_ratio", 4))]
    check_pattern(dict(widths), config.prune)


def _looks_local(path: str) -> bool:
    """A hub name is NAME or OWNER/NAME; anything else, and what exists, is a folder."""
    if Path(path).exists():
        return True
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(f"there is no folder {path}; give a checkpoint folder or a hub name such as mosaicml/mpt-7b")
    return False
