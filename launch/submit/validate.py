"""What can be known to fail is said before the first job starts; and what a run will do, in numbers."""

import math
from dataclasses import dataclass
from pathlib import Path

from sparse_train.config import EvaluateConfig, RunConfig, TaskConfig, TrainConfig
from sparse_train.errors import UserError
from sparse_train.hub import has_data_set, hub_answers, may_be_hub_name
from sparse_train.registry import FAMILIES, TASKS


@dataclass(frozen=True)
class Size:
    num_parameters: int
    num_prunable: int


def check(config: RunConfig, dry_run: bool = False) -> tuple[Size, list[str]]:
    """(the model's size, remarks). Raises UserError: missing data, a folder that is no checkpoint or whose tokenizer is
    not the model's, a task that is not for the model, data of which nothing fits it, N:M that does not divide a width.

    A dry run does without data, and asks the hub for nothing but a model's config, without which it does as well.
    """
    from sparse_train.models import (
        check_on_hub,
        describe,
        empty_model,
        family_of,
        is_folder,
        load_processor,
        open_model,
        read_config,
    )
    from sparse_train.pruning import check_pattern
    from sparse_train.tasks import build_task, scored_examples, training_examples

    remarks, read = [], []
    calibration = config.prune.calibration
    for task, splits in ((config.task, ("train", "test")), *([(calibration, ("train",))] if calibration else [])):
        if dry_run and task.path and not Path(task.path).is_absolute() and not Path(task.path).exists():
            taken = ", so it is taken as a name on the hub" if may_be_hub_name(task.path) else ""
            remarks.append(f"data {task.path}: not on this machine{taken}; not looked at")
        else:
            built = build_task(task)
            for split in splits:
                built.examples(split, 1)
                read.append((built, split))
    path, shape = config.dense.path or config.model.path, describe(config.model)
    local = path is not None and is_folder(path)
    if local:
        shape = open_model(path)[0].config  # what names and shapes tell of it
    elif path is not None:
        try:
            shape = read_config(path)
        except UserError as error:
            if not dry_run:
                raise
            why = error if hub_answers() else "the hub cannot be reached"
            remarks.append(f"model {path}: {why}; sizes are those of the config")
    _check_task(config.task, shape, "task")
    if calibration:
        _check_task(calibration, shape, "prune.calibration")
    _check_lengths(config, shape, is_new=path is None)
    if local:
        processor = load_processor(path, config.task.language)
        for built, split in read:  # one that fits is enough: others are left out, counted and named
            if split == "train":
                training_examples(built, processor, 1)
            else:
                most = max(config.evaluate.max_new_tokens, config.benchmark.new_tokens)
                scored_examples(built, processor, EvaluateConfig(num_examples=1, max_new_tokens=most))
    elif path is not None and not dry_run:
        check_on_hub(path, shape)
    model = empty_model(shape)
    family = family_of(model)
    shapes = {name: tuple(linear.weight.shape) for name, linear in family.prunable_linears(model).items()}
    for level in config.prune.levels:
        check_pattern(shapes, level)
    for loss in config.finetune.losses.values():
        if loss.feature_weight:
            family.feature_points(model, loss.final_feature)
    return size_of(model), remarks


def require_data(config: RunConfig) -> None:
    """Raises UserError where a run would not find its data. A dry run, which does without, asks last."""
    from sparse_train.tasks import read

    for task in (config.task, config.prune.calibration):
        if task and task.path and read.local(task, "data") is None and has_data_set(task.path) is False:
            raise UserError(f"task.path={task.path}: there is no such file or folder here, and no data set of that "
                            "name on the hub that you may read")


def size_of(model) -> Size:
    """Of a model with or without data."""
    from sparse_train.models import family_of

    linears = family_of(model).prunable_linears(model).values()
    return Size(sum(math.prod(p.shape) for p in model.parameters()),
                sum(linear.in_features * linear.out_features for linear in linears))


def _check_task(task: TaskConfig, shape, key: str) -> None:
    from sparse_train.models import family_of_type

    kind, takes_audio = TASKS.load(task.name), family_of_type(shape.model_type).takes_audio
    if kind.takes_audio != takes_audio:
        audio = " or ".join(name for name, entry in FAMILIES.entries.items() if entry.audio_step_s)
        raise UserError(f"{key}.name={task.name} has {'sound' if kind.takes_audio else 'text'} as its input, and a "
                        f"{shape.model_type} model takes {'sound' if takes_audio else 'text'}; choose another task, or "
                        f"{f'another model.family than {audio}' if takes_audio else f'model.family={audio}'}")
    if shape.is_encoder_decoder and not kind.generates:
        raise UserError(f"{key}.name={task.name} has no prompts, and the encoder of a {shape.model_type} model would "
                        "read nothing; choose another task, or a model without an encoder")


def _check_lengths(config: RunConfig, shape, is_new: bool) -> None:
    """Against the positions of the decoder, where it has a last one. A decoder that is also the encoder of its prompt
    is not asked about task.max_length, which only bounds what most examples are far below."""
    from sparse_train.models import family_of_type
    from sparse_train.models.positions import decoder_positions

    family = family_of_type(shape.model_type)
    if not is_new and family.needs_language(shape) and config.task.language is None:
        raise UserError("task.language is missing: the model knows many languages; give one, such as "
                        "task.language=hindi")
    positions = decoder_positions(shape)
    if positions is None:
        return
    prefix = 0
    if shape.is_encoder_decoder:
        prefix = 1 if is_new else family.prefix_length
    for key, count in (("evaluate.max_new_tokens", config.evaluate.max_new_tokens),
                       ("benchmark.new_tokens", config.benchmark.new_tokens)):
        if prefix + count > positions:
            raise UserError(f"{key}={count} and the {prefix} tokens that an answer starts from are more than the "
                            f"model's {positions} positions; give at most {positions - prefix}")
    if shape.is_encoder_decoder and config.task.max_length > positions:
        raise UserError(f"task.max_length={config.task.max_length} is more than the {positions} positions of the "
                        f"model's decoder; give at most {positions}")


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
