"""What can be known to fail is said before the first job starts; and what a run will do, in numbers."""

import math
from dataclasses import dataclass
from pathlib import Path

from sparse_train.config import RunConfig, TrainConfig
from sparse_train.errors import UserError


@dataclass(frozen=True)
class Size:
    num_parameters: int
    num_prunable: int


def check(config: RunConfig, dry_run: bool = False) -> tuple[Size, list[str]]:
    """(the model's size, remarks). Raises UserError: missing data, a folder that is no checkpoint, N:M that does not
    divide a width. A dry run asks the hub for nothing but a model's config, and does without where that fails."""
    from sparse_train.models import describe, empty_model, family_of, read_config
    from sparse_train.pruning import check_pattern
    from sparse_train.sparse import TensorFolder
    from sparse_train.tasks import build_task

    remarks = []
    if config.task.path and dry_run and not Path(config.task.path).exists() and _looks_like_hub(config.task.path):
        remarks.append(f"data {config.task.path}: on the hub, not looked at")
    else:
        build_task(config.task)
    path, shape = config.dense.path or config.model.path, describe(config.model)
    if path is not None:
        local = _is_local(path)
        if local:
            TensorFolder(Path(path))
        try:
            shape = read_config(path)
        except UserError:
            if local or not dry_run:
                raise
            remarks.append(f"model {path}: the hub cannot be reached, sizes are those of the config")
    model = empty_model(shape)
    linears = family_of(model).prunable_linears(model)
    check_pattern({name: linear.in_features for name, linear in linears.items()}, config.prune)
    return Size(sum(math.prod(p.shape) for p in model.parameters()),
                sum(linear.in_features * linear.out_features for linear in linears.values())), remarks


def numbers(config: RunConfig, size: Size) -> list[str]:
    """Lines on steps, tokens and parameters kept."""
    lines = [f"{size.num_parameters:,} parameters, {size.num_prunable:,} of them prunable"]
    for level in config.prune.levels:
        kept = round((1 - level.sparsity) * size.num_prunable)
        lines.append(f"{level.sparsity:.0%} sparse: {kept:,} prunable parameters kept, "
                     f"{size.num_parameters - size.num_prunable + kept:,} in all")
    if not config.dense.path:
        lines.append(f"dense: {_work(config.dense, config)}")
    lines.append(f"each fine-tune: {_work(config.finetune, config)}")
    return lines


def _work(train: TrainConfig, config: RunConfig) -> str:
    num_examples = train.steps * train.batch_size
    return (f"{train.steps:,} steps of {train.batch_size} examples, at most "
            f"{num_examples * config.task.max_length:,} tokens")


def _is_local(path: str) -> bool:
    if Path(path).exists():
        return True
    if not _looks_like_hub(path):
        raise UserError(f"there is no folder {path}; give a checkpoint folder or a hub name such as mosaicml/mpt-7b")
    return False


def _looks_like_hub(path: str) -> bool:
    """A hub name is NAME or OWNER/NAME; anything else, and what exists, is a folder."""
    return not path.startswith((".", "/", "~")) and path.count("/") <= 1
