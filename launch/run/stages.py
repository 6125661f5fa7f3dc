"""The stage graph of a run: the stages, their inputs, and the keys of the config that each reads."""

from collections.abc import Sequence

from sparse_train.config import (
    EvaluateConfig,
    PruneConfig,
    RunConfig,
    RunTaskConfig,
    Section,
    TaskConfig,
    TrainConfig,
)
from sparse_train.errors import UserError
from sparse_train.jobs.stage import Kind, Stage
from sparse_train.registry import PRUNERS, TASKS

_CALIBRATION = ("prune.num_calibration", "prune.calibration", "prune.batch_size", "prune.damping")
"""The keys that rounding with calibration reads."""


def build_stages(config: RunConfig) -> list[Stage]:
    """In the order in which they run."""
    dense = Stage(Kind.DENSE, "dense", (
        "seed", *_trained_data(config.task), "model.path" if config.model.path else "model", *_training("dense")),
        external=config.dense.path)
    chain = _chain(config, dense)
    one_shots = [stage for stage in chain if stage.kind is Kind.PRUNE and stage.loss is None]
    tuned = [stage for stage in chain if stage.kind is Kind.FINETUNE]
    # In a chain, the fine-tune of the last level.
    last = next(stage for stage in reversed(tuned) if stage.loss == config.compressed_loss)
    data = _of(TaskConfig, "task", "max_bad_share")
    evaluate = Stage(Kind.EVALUATE, "evaluate", (*data, *_of(EvaluateConfig, "evaluate", "placement")),
                     (dense, *one_shots, *tuned))
    answers = _of(EvaluateConfig, "evaluate", "placement", "precision", "texts", "num_texts")
    rounding = ("compress.rounding", *(_CALIBRATION if config.compress.rounding == "compensated" else ()))
    compress = Stage(Kind.COMPRESS, "compress", (*data, *answers, "compress.precisions", "compress.int8_head",
                                                 *rounding), (last,))
    devices = config.benchmark.devices
    benchmarks = [Stage(Kind.BENCHMARK, f"benchmark/{device}" if len(devices) > 1 else "benchmark",
                        ("name", *data, "benchmark", "prune.sparsity", "compress.precisions"),
                        (dense, last, compress), device=device) for device in devices]
    report = Stage(Kind.REPORT, "report", (
        "name", "about", "task.name", "prune", "finetune.num_examples", "finetune.steps", "compress.loss"),
        (dense, *chain, evaluate, compress, *benchmarks))
    return [*([] if dense.external else [dense]), *chain, evaluate, compress, *benchmarks, report]


def select(stages: list[Stage], names: Sequence[str]) -> list[Stage]:
    """The stages whose kind or id is in `names`; all when it is empty. Raises UserError."""
    known = list(dict.fromkeys(name for stage in stages for name in (stage.kind.value, stage.id)))
    for name in names:
        if name not in known:
            raise UserError(f"there is no stage {name} in this run; choose from: {', '.join(known)}")
    return [stage for stage in stages if not names or stage.kind in names or stage.id in names]


def find_stage(config: RunConfig, name: str) -> Stage:
    """The stage with this id, or the only one of this kind. Raises UserError."""
    stages = select(build_stages(config), [name])
    exact = [stage for stage in stages if stage.id == name] or stages
    if len(exact) > 1:
        raise UserError(f"{name} is {len(stages)} stages of this run; give one: {', '.join(s.id for s in stages)}")
    return exact[0]


def _chain(config: RunConfig, dense: Stage) -> list[Stage]:
    """The stages that prune and fine-tune.

    Every level has a one-shot model, pruned from the dense one. From the second level on, each loss also prunes its own
    fine-tuned model of the level before.
    """
    pruning, training = _pruning(config), ("seed", *_trained_data(config.task), *_training("finetune"))
    levels, stages = config.prune.levels, []
    tuned: dict[str, Stage] = {}
    for index, level in enumerate(levels):
        suffix = f"/{100 * level.sparsity:g}" if len(levels) > 1 else ""
        one_shot = Stage(Kind.PRUNE, f"prune{suffix}/one-shot" if suffix else "prune", pruning, (dense,), level=index)
        stages.append(one_shot)
        for name, loss in config.finetune.losses.items():
            pruned = one_shot
            if index:
                pruned = Stage(Kind.PRUNE, f"prune{suffix}/{name}", pruning, (tuned[name],), loss=name, level=index)
                stages.append(pruned)
            teacher = ("finetune.teacher.precision",) if loss.needs_teacher else ()
            tuned[name] = Stage(Kind.FINETUNE, f"finetune{suffix}/{name}",
                                (*training, f"finetune.losses.{name}", *teacher), (dense, pruned), loss=name,
                                level=index)
            stages.append(tuned[name])
    return stages


def _of(section: type[Section], name: str, *without: str) -> tuple[str, ...]:
    """The dotted keys of a section called `name`, except those in `without`."""
    return tuple(f"{name}.{key}" for key in section.model_fields if key not in without)


def _training_data(task: TaskConfig) -> tuple[str, ...]:
    """The keys that decide the training examples. How many bad rows are an error (max_bad_share) changes none."""
    scored = ["shots", "test_prompt", "max_bad_share"]
    return _of(TaskConfig, "task", *scored, *([] if TASKS.entries[task.name].reads_both_splits else ["test_split"]))


def _trained_data(task: RunTaskConfig) -> tuple[str, ...]:
    """Those of a training, which may also pack them and mix others in."""
    return *_training_data(task), "task.pack", "task.mix"


def _training(name: str) -> tuple[str, ...]:
    """The keys that decide what a training learns.

    How its work is divided (ZeRO, sequence parallelism, activation checkpointing), and what it saves and logs, changes
    rounding at most, so a stopped training may continue with other values.
    """
    return _of(TrainConfig, name, "activation_checkpointing", "sequence_parallel", "zero", "checkpoint_every",
               "checkpoints_kept", "log_every")


def _pruning(config: RunConfig) -> tuple[str, ...]:
    """The keys that a pruning depends on, which differ by method. The tokenizer's language is saved in its folder."""
    method, allocation = PRUNERS.entries[config.prune.method], config.prune.allocation
    read = {*method.keys, "damping"} if config.prune.refits else {*method.keys}
    unread = [key for other in PRUNERS.entries.values() for key in other.keys if key not in read]
    unread += ["allocation_spread"] * (allocation == "uniform") + ["outlier_factor"] * (allocation != "owl")
    if not config.prune.calibrates:
        return *_of(PruneConfig, "prune", *unread, "num_calibration", "calibration", "batch_size"), "task.language"
    data = () if config.prune.calibration else _training_data(config.task)
    return *_of(PruneConfig, "prune", *unread), *data, "task.language"
