"""The stage graph of a run: which job makes which folder from which, and when that is already done.

A stage's *sources* are the values of the config that it reads and the digests of its inputs. They stand in the manifest
of the finished folder; a folder whose sources are still the same is current, and of others the difference is known.
A key that the manifest does not know counts as its default, so a release that adds keys makes nothing stale.
"""

import contextlib
import json
import textwrap
from pathlib import Path
from typing import Any

from sparse_train import artifacts
from sparse_train.config import PruneConfig, RunConfig, Section, TaskConfig, TrainConfig
from sparse_train.config.load import load_frozen
from sparse_train.errors import UserError
from sparse_train.jobs.job import Input
from sparse_train.jobs.stage import Kind, Stage
from sparse_train.registry import PRUNERS, TASKS

CONFIG, JOB_FILE = "config.yaml", "job"


def read_run(folder: Path) -> RunConfig:
    """The config of the run in `folder`, whose path is where it is now, as seen from here."""
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is no run folder: it has no {CONFIG}; give the folder that a run made")
    folder = folder.absolute()
    return load_frozen(folder / CONFIG).model_copy(update={"folder": str(folder.parent), "name": folder.name})


def find_stage(config: RunConfig, name: str) -> Stage:
    """By its id, or by its kind where there is one of it. Raises UserError."""
    found = select(build_stages(config), [name])
    exact = [stage for stage in found if stage.id == name] or found
    if len(exact) > 1:
        raise UserError(f"{name} is {len(found)} stages of this run; give one: {', '.join(s.id for s in found)}")
    return exact[0]


def build_stages(config: RunConfig) -> list[Stage]:
    """In the order in which they run."""
    dense = Stage(Kind.DENSE, "dense", (
        "seed", *_training_data(config.task), "model.path" if config.model.path else "model", *_training("dense")),
        external=config.dense.path)
    chain = _chain(config, dense)
    one_shots = [stage for stage in chain if stage.kind is Kind.PRUNE and stage.loss is None]
    tuned = [stage for stage in chain if stage.kind is Kind.FINETUNE]
    # In a chain, that of the last level.
    last = next(stage for stage in reversed(tuned) if stage.loss == config.compressed_loss)
    data = _of(TaskConfig, "task", "max_bad_share")
    evaluate = Stage(Kind.EVALUATE, "evaluate", (*data, "evaluate"), (dense, *one_shots, *tuned))
    compress = Stage(Kind.COMPRESS, "compress", (*data, "evaluate", "compress.precisions"), (last,))
    devices = config.benchmark.devices
    benchmarks = [Stage(Kind.BENCHMARK, f"benchmark/{device}" if len(devices) > 1 else "benchmark",
                        ("name", *data, "benchmark", "prune.sparsity", "compress.precisions"),
                        (dense, last, compress), device=device) for device in devices]
    report = Stage(Kind.REPORT, "report", (
        "name", "about", "task.name", "prune", "finetune.num_examples", "finetune.steps", "compress.loss"),
        (dense, *chain, evaluate, compress, *benchmarks))
    return [*([] if dense.external else [dense]), *chain, evaluate, compress, *benchmarks, report]


def _of(section: type[Section], name: str, *without: str) -> tuple[str, ...]:
    """Dotted keys of a section called `name`, but for some."""
    return tuple(f"{name}.{key}" for key in section.model_fields if key not in without)


def _training_data(task: TaskConfig) -> tuple[str, ...]:
    """What training examples come from. How many bad rows are an error changes no example."""
    scored = ["shots", "test_prompt", "max_bad_share"]
    return _of(TaskConfig, "task", *scored, *([] if TASKS.entries[task.name].reads_both_splits else ["test_split"]))


def _training(name: str) -> tuple[str, ...]:
    """What a training learns from. How its work is divided (ZeRO, sequence parallelism, activation checkpointing) and
    what it saves and logs change rounding at most, so a stopped training may go on with other values."""
    return _of(TrainConfig, name, "activation_checkpointing", "sequence_parallel", "zero", "checkpoint_every",
               "checkpoints_kept", "log_every")


def _pruning(config: RunConfig) -> tuple[str, ...]:
    """What a pruning depends on, which the method decides. The tokenizer's language goes into the folder."""
    method = PRUNERS.entries[config.prune.method]
    unread = [key for other in PRUNERS.entries.values() for key in other.keys if key not in method.keys]
    if not method.calibrates:
        return *_of(PruneConfig, "prune", *unread, "num_calibration", "calibration", "batch_size"), "task.language"
    data = () if config.prune.calibration else _training_data(config.task)
    return *_of(PruneConfig, "prune", *unread), *data, "task.language"


def _chain(config: RunConfig, dense: Stage) -> list[Stage]:
    """The stages that prune and fine-tune.

    Every level has its one-shot model, pruned from dense; from the second level on each loss prunes its own last one.
    """
    pruning, training = _pruning(config), ("seed", *_training_data(config.task), *_training("finetune"))
    levels, stages = config.prune.levels, []
    tuned: dict[str, Stage] = {}
    for index, level in enumerate(levels):
        below = f"/{100 * level.sparsity:g}" if len(levels) > 1 else ""
        one_shot = Stage(Kind.PRUNE, f"prune{below}/one-shot" if below else "prune", pruning, (dense,), level=index)
        stages.append(one_shot)
        for name, loss in config.finetune.losses.items():
            pruned = one_shot
            if index:
                pruned = Stage(Kind.PRUNE, f"prune{below}/{name}", pruning, (tuned[name],), loss=name, level=index)
                stages.append(pruned)
            teacher = ("finetune.teacher.precision",) if loss.needs_teacher else ()
            tuned[name] = Stage(Kind.FINETUNE, f"finetune{below}/{name}",
                                (*training, f"finetune.losses.{name}", *teacher), (dense, pruned), loss=name,
                                level=index)
            stages.append(tuned[name])
    return stages


def select(stages: list[Stage], names: list[str]) -> list[Stage]:
    """The stages whose kind or id is in `names`; all when it is empty. Raises UserError."""
    known = list(dict.fromkeys(name for stage in stages for name in (stage.kind.value, stage.id)))
    for name in names:
        if name not in known:
            raise UserError(f"there is no stage {name} in this run; choose from: {', '.join(known)}")
    return [stage for stage in stages if not names or stage.kind in names or stage.id in names]


def sources(stage: Stage, config: RunConfig) -> dict[str, dict[str, Any]] | None:
    """What the stage is made from, as plain data: {"config": {dotted key: value}, "inputs": {name: digest}}.

    None while an input is not finished.
    """
    inputs = {name: _fingerprint(path) for name, path in _outside(stage, config).items()}
    for source in stage.upstream:
        manifest = artifacts.read_manifest(config.path / source.id)
        if manifest is None:
            return None
        inputs[source.id] = artifacts.digest(manifest["files"])
    seen = _seen_by(stage, config)
    return {"config": {key: _plain(_value(seen, key)) for key in stage.reads}, "inputs": inputs}


def why_stale(recorded: Any, stage: Stage, config: RunConfig, whole: Any = None) -> str | None:
    """The first difference between a folder's recorded sources and today's, in words; None where there is none.

    `whole`: the config that the folder was made with, for keys that an older release knew and did not count.
    """
    today = sources(stage, config)
    if today is None:
        return "an input is not finished"
    if not isinstance(recorded, dict) or not all(isinstance(recorded.get(key), dict) for key in today):
        return "an older release made it and noted nothing to compare"
    seen = _seen_by(stage, config)
    for key in stage.reads:
        if key in recorded["config"]:
            before = recorded["config"][key]
        elif (before := _at(whole, key)) is None:  # of a key that an older release did not know the default held
            before = _default(seen, key)
        if found := _change(before, _value(seen, key), key):
            return found
    for name in [*today["inputs"], *recorded["inputs"]]:  # in the order of the stages, the same at each look
        if today["inputs"].get(name) != recorded["inputs"].get(name):
            words = "has changed" if name in recorded["inputs"] else "was not read"
            return f"{name} {words}" if name in today["inputs"] else f"it read {name}"
    return None


def _change(before: Any, now: Any, key: str) -> str | None:
    """The first key at or below `key` whose value differs."""
    if isinstance(now, Section) and isinstance(before, dict):
        found = (_change(before.get(name, _plain(field.get_default(call_default_factory=True))), getattr(now, name),
                         f"{key}.{name}") for name, field in type(now).model_fields.items())
        return next(filter(None, found), None)
    if before == _plain(now):
        return None
    return f"{key}: {_short(before)} -> {_short(_plain(now))}"


def _short(value: Any) -> str:
    return textwrap.shorten(json.dumps(value, ensure_ascii=False), 60, placeholder=" ...")


def _seen_by(stage: Stage, config: RunConfig) -> RunConfig:
    """Of what the config has a list, the stage sees one item."""
    if stage.kind is Kind.PRUNE:
        return config.model_copy(update={"prune": config.prune.levels[stage.level]})
    if stage.kind is Kind.BENCHMARK:
        benchmark = config.benchmark.model_copy(update={"devices": (stage.device,)})
        return config.model_copy(update={"benchmark": benchmark})
    return config


def _value(config: RunConfig, key: str) -> Any:
    found: Any = config
    for part in key.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    return found


def _default(config: RunConfig, key: str) -> Any:
    parent, _, last = key.rpartition(".")
    section = _value(config, parent) if parent else config
    field = type(section).model_fields.get(last) if isinstance(section, Section) else None
    return _plain(field.get_default(call_default_factory=True)) if field and not field.is_required() else None


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(value, default=lambda section: section.model_dump(mode="json")))


def is_current(stage: Stage, config: RunConfig) -> bool:
    manifest = artifacts.read_manifest(config.path / stage.id)
    return manifest is not None and why_stale(manifest.get("sources"), stage, config, manifest.get("config")) is None


def _outside(stage: Stage, config: RunConfig) -> dict[str, str]:
    """Paths from outside the run that the stage reads, by what names them."""
    calibration = config.prune.calibration
    named = {"task.path": config.task.path, "model.path": config.model.path,
             "prune.calibration.path": calibration and calibration.path}
    external = {source.id: source.external for source in stage.inputs if source.external}
    return {**external, **{key: path for key, path in named.items() if path and any(
        key.startswith(part) for part in stage.reads)}}


def dense_of_sweep(config: RunConfig) -> RunConfig:
    """The run that makes the dense model of `config`, a run of a sweep, and of all who agree with it on how that is
    made."""
    dense = find_stage(config, Kind.DENSE)
    # Without what is at its default, so that a release that adds keys finds the models of an older one.
    given = config.model_dump(mode="json", exclude_defaults=True)
    keys = {key: found for key in dense.reads if (found := _at(given, key)) is not None}
    made_from = artifacts.digest([keys, sources(dense, config)["inputs"]])
    return config.model_copy(update={"name": f"dense-{made_from[:8]}"})


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def is_dense_of_sweep(config: RunConfig) -> bool:
    """Such a run has no other stages."""
    return not config.dense.path and config.name == dense_of_sweep(config).name


def read_inputs(stage: Stage, config: RunConfig) -> tuple[Input, ...]:
    """Dense first, then in the order of the graph."""
    return tuple(Input(source, source.external or config.path / source.id) for source in stage.inputs)


def partial_folder(stage: Stage, config: RunConfig) -> Path:
    return config.path / f"{stage.id}.partial"


def log_folder(stage: Stage, config: RunConfig) -> Path:
    return config.path / "logs" / stage.id


def progress_file(stage: Stage, config: RunConfig) -> Path:
    return log_folder(stage, config) / "progress.json"


def read_progress(stage: Stage, config: RunConfig) -> dict[str, Any] | None:
    """What sparse_train.tracking.Progress wrote last; None where there is nothing, or nothing that can be read."""
    types = {"done": int, "total": int, "note": str, "seconds_left": int | float | None}
    with contextlib.suppress(UserError, OSError):
        found = artifacts.read_json(progress_file(stage, config))
        if isinstance(found, dict) and all(isinstance(found.get(key), kind) for key, kind in types.items()):
            return found
    return None


def _fingerprint(path: str) -> str:
    """Of names, sizes and times of a file or of a folder's: reading a large model to skip a stage is too much."""
    top = Path(path)
    files = [top] if top.is_file() else sorted(top.rglob("*"))
    return artifacts.digest([(str(file.relative_to(top)), (stat := file.stat()).st_size, stat.st_mtime_ns)
                             for file in files if file.is_file()])
