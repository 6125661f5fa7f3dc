"""Checks of a run before its first job, so that predictable failures are reported early; and a summary of its work."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_train.config import EvaluateConfig, RunConfig, RunTaskConfig, TaskConfig, TrainConfig
from sparse_train.config.options import read_options
from sparse_train.errors import UserError
from sparse_train.extras import require
from sparse_train.hub import has_data_set, hub_answers, may_be_hub_name
from sparse_train.jobs.stage import Kind
from sparse_train.launch.run.stages import build_stages, select
from sparse_train.registry import FAMILIES, TASKS

if TYPE_CHECKING:  # torch takes seconds to import
    from transformers import PretrainedConfig, PreTrainedModel

    from sparse_train.pruning.parameters import ParameterCounts
    from sparse_train.tasks import Task


@dataclass(frozen=True)
class Validation:
    parameters: "ParameterCounts"
    remarks: list[str]
    """What a dry run could not check, a line each."""


def validate(config: RunConfig, names: Sequence[str] = (), dry_run: bool = False) -> Validation:
    """Check data, model, and whether they fit each other, and the packages that the selected stages need.

    `names` select the stages; without any all are.

    A dry run works without the data, and reads nothing but a model's config from the hub, which it can do without.
    Raises UserError for data that is missing or of which nothing fits the model, a task that the model cannot do, a
    folder that is not a checkpoint or whose tokenizer is not the model's, a chat where there is no chat template,
    pruning that does not fit the model or its linears, a loss on features that the model does not have, and packing
    where examples cannot be kept apart.
    """
    from sparse_train.models import as_folder, check_on_hub, empty_model, is_folder
    from sparse_train.pruning import build_pruner
    from sparse_train.pruning.backward import require_decoder_only
    from sparse_train.pruning.parameters import count_parameters
    from sparse_train.pruning.statistics import Gradients

    if any(stage.kind is Kind.REPORT for stage in select(build_stages(config), names)):
        require("plots")  # before hours of work
    if config.tracking.wandb:
        require("wandb")
    pruner = build_pruner(config.prune)  # refuses options that it does not have
    remarks: list[str] = []
    data = _read_first_examples(config, dry_run, remarks)
    path = config.dense.path or config.model.path
    if path is not None and not dry_run:
        path = str(as_folder(path))
    model_config = _read_model_config(config, path, dry_run, remarks)
    for task in (config.task, *_other_tasks(config)):
        _check_task(task, model_config)
    for text in config.evaluate.texts.values():
        _check_text(text, model_config)
    if path is not None:
        _check_language(config.task, model_config)
    _check_lengths(config, model_config, is_new=path is None)
    if path is None:
        _refuse_chat(data)
    elif is_folder(path):
        _check_examples_fit(config, path, data)
    elif not dry_run:
        check_on_hub(path, model_config)
    model = empty_model(model_config)
    parameters = count_parameters(model, config.prune)
    if pruner.Statistics is Gradients:
        require_decoder_only(model)
    _check_features(config, model)
    if config.task.pack:
        _check_packing(config, model)
    return Validation(parameters, remarks)


def require_data(config: RunConfig) -> None:
    """Raises UserError where a run would not find its data. It is the last check of a dry run."""
    from sparse_train.tasks import read

    for task in (config.task, *_other_tasks(config), *config.evaluate.texts.values()):
        if task.path and read.local(task, "data") is None and has_data_set(task.path) is False:
            raise UserError(f"{task.key}.path={task.path}: there is no such file or folder here, and no data set of "
                            "that name on the hub that you may read")


def _other_tasks(config: RunConfig) -> list[TaskConfig]:
    """Those whose training examples are read beside the run's own task."""
    return [task for task in (config.prune.calibration, config.task.mix and config.task.mix.task) if task]


def summarise(config: RunConfig, parameters: "ParameterCounts") -> list[str]:
    """Lines on parameters kept, steps and tokens."""
    lines = [f"{parameters.total:,} parameters, {parameters.prunable:,} of them prunable"]
    for num_kept in parameters.kept:
        lines.append(f"{1 - num_kept / parameters.prunable:.0%} sparse: {num_kept:,} prunable parameters kept, "
                     f"{parameters.total - parameters.prunable + num_kept:,} in all")
    if not config.dense.path:
        lines.append(f"dense: {_steps_and_tokens(config.dense, config.task)}")
    lines.append(f"each fine-tune: {_steps_and_tokens(config.finetune, config.task)}")
    return lines


def _steps_and_tokens(train: TrainConfig, task: RunTaskConfig) -> str:
    rows = "windows" if task.pack else "examples"
    num_tokens = train.steps * train.batch_size * task.max_length
    if task.mix and not task.pack:
        num_mixed = int(train.steps * train.batch_size * task.mix.share)
        num_tokens += num_mixed * (task.mix.task.max_length - task.max_length)
    return f"{train.steps:,} steps of {train.batch_size} {rows}, at most {num_tokens:,} tokens"


@dataclass(frozen=True)
class _Split:
    task: "Task"
    name: str
    """train or test."""


def _read_first_examples(config: RunConfig, dry_run: bool, remarks: list[str]) -> list[_Split]:
    """The splits that the run reads, each of which has an example."""
    from sparse_train.tasks import build_task

    splits = []
    for task_config, names in ((config.task, ("train", "test")),
                               *((other, ("train",)) for other in _other_tasks(config)),
                               *((text, ("test",)) for text in config.evaluate.texts.values())):
        if dry_run and _may_be_elsewhere(task_config):
            on_hub = ", so it is assumed to be a name on the hub" if may_be_hub_name(str(task_config.path)) else ""
            remarks.append(f"data {task_config.path}: not on this machine{on_hub}; not checked")
            continue
        task = build_task(task_config)
        for name in names:
            task.examples(name, 1)
            splits.append(_Split(task, name))
    return splits


def _may_be_elsewhere(task: TaskConfig) -> bool:
    """Whether missing data may be on the hub, or on the machine where the run will be."""
    return task.path is not None and not Path(task.path).is_absolute() and not Path(task.path).exists()


def _read_model_config(config: RunConfig, path: str | None, dry_run: bool, remarks: list[str]) -> "PretrainedConfig":
    """The config of the model to start from: a folder, whose names and shapes are checked, the hub, or a new one."""
    from sparse_train.models import describe, is_folder, is_gguf, open_model, read_config

    if path is None:
        return describe(config.model)
    if is_folder(path):
        model, _ = open_model(path)
        return model.config
    if is_gguf(path):
        remarks.append(f"model {path}: only its header is read before a run")
        return read_config(path)
    try:
        return read_config(path)
    except UserError as error:
        if not dry_run:
            raise
        cause = error if hub_answers() else "the hub cannot be reached"
        remarks.append(f"model {path}: {cause}; sizes are those of the config")
        return describe(config.model)


def _check_task(task: TaskConfig, model: "PretrainedConfig") -> None:
    """Whether the task has the options, and the model can do it."""
    from sparse_train.models import family_of_type

    key, kind, model_takes_audio = task.key, TASKS.load(task.name), family_of_type(model.model_type).takes_audio
    read_options(kind.Options, task.options, f"{key}.options", f"{key}.name={task.name}")
    if kind.takes_audio != model_takes_audio:
        families = " or ".join(name for name, entry in FAMILIES.entries.items() if entry.audio_step_s)
        remedy = f"another model.family than {families}" if model_takes_audio else f"model.family={families}"
        raise UserError(f"{key}.name={task.name} has {_input(kind.takes_audio)} as its input, and a {model.model_type} "
                        f"model takes {_input(model_takes_audio)}; choose another task, or {remedy}")
    if model.is_encoder_decoder and not kind.generates:
        raise UserError(f"{key}.name={task.name} has no prompts, and the encoder of a {model.model_type} model would "
                        "read nothing; choose another task, or a model without an encoder")


def _check_text(text: TaskConfig, model: "PretrainedConfig") -> None:
    _check_task(text, model)
    if TASKS.load(text.name).generates:
        raise UserError(f"{text.key}.name={text.name} has questions and answers; give general text "
                        f"({text.key}.name=text)")


def _input(is_audio: bool) -> str:
    return "sound" if is_audio else "text"


def _check_language(task: TaskConfig, model: "PretrainedConfig") -> None:
    from sparse_train.models import family_of_type

    if task.language is None and family_of_type(model.model_type).needs_language(model):
        raise UserError("task.language is missing: the model knows many languages; give one, such as "
                        "task.language=hindi")


def _check_lengths(config: RunConfig, model: "PretrainedConfig", is_new: bool) -> None:
    """Compare lengths with the number of the decoder's positions, where that is limited.

    task.max_length is compared only where there is an encoder: a decoder alone also holds the prompt, and the longest
    examples are left out.
    """
    from sparse_train.models import family_of_type
    from sparse_train.models.positions import decoder_positions

    positions, prefix = decoder_positions(model), 0
    if positions is None:
        return
    if model.is_encoder_decoder:
        prefix = 1 if is_new else family_of_type(model.model_type).prefix_length
    for key, count in (("evaluate.max_new_tokens", config.evaluate.max_new_tokens),
                       ("benchmark.new_tokens", config.benchmark.new_tokens)):
        if prefix + count > positions:
            raise UserError(f"{key}={count} and the {prefix} tokens that an answer starts from are more than the "
                            f"model's {positions} positions; give at most {positions - prefix}")
    if model.is_encoder_decoder and config.task.max_length > positions:
        raise UserError(f"task.max_length={config.task.max_length} is more than the {positions} positions of the "
                        f"model's decoder; give at most {positions}")


def _refuse_chat(data: list[_Split]) -> None:
    for split in data:
        if split.task.examples(split.name, 1)[0].history is not None:
            raise UserError("a new model's tokenizer has no chat template; give the model to start from (dense.path, "
                            "model.path), or leave task.chat out")


def _check_examples_fit(config: RunConfig, path: str, data: list[_Split]) -> None:
    """Raises UserError unless an example fits. The stages leave the others out, count and name them."""
    from sparse_train.models import load_processor
    from sparse_train.tasks import scored_examples, training_examples

    processor = load_processor(path, config.task.language)
    new_tokens = max(config.evaluate.max_new_tokens, config.benchmark.new_tokens)
    for split in data:
        if split.name == "train":
            training_examples(split.task, processor, 1)
        else:
            scored_examples(split.task, processor, EvaluateConfig(num_examples=1, max_new_tokens=new_tokens))


def _check_features(config: RunConfig, model: "PreTrainedModel") -> None:
    from sparse_train.models import family_of

    for loss in config.finetune.losses.values():
        if loss.feature_weight:
            family_of(model).feature_points(model, loss.features)


def _check_packing(config: RunConfig, model: "PreTrainedModel") -> None:
    from sparse_train.models import family_of

    family_of(model).separate_examples(model)
    counts = {"finetune": config.finetune.num_examples} | (
        {} if config.dense.path else {"dense": config.dense.num_examples})
    for key, task, unlimited in (("task", config.task, [f"{name}.num_examples" for name in counts if not counts[name]]),
                                 ("task.mix.task", config.task.mix and config.task.mix.task, ["another task"])):
        if task and unlimited and TASKS.load(task.name).endless:
            raise UserError(f"task.pack=true: the examples of {key}.name={task.name} never end, so they cannot be "
                            f"divided into windows; give {' and '.join(unlimited)}")
