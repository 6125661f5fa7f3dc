"""What a stage is made from, and when its result is no longer current.

A stage's *sources* are the values of the config that it reads and the digests of its inputs. They are recorded in the
manifest of the finished folder. A folder whose sources are still the same is current; for any other the difference can
be named. A key that is missing in the manifest counts as its default, so a release that adds keys makes nothing stale.
"""

import json
import textwrap
from pathlib import Path
from typing import Any

from sparse_train import artifacts
from sparse_train.config import RunConfig, Section
from sparse_train.jobs.stage import Kind, Stage
from sparse_train.launch.run.stages import find_stage


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
    stage_config = _config_of_stage(stage, config)
    return {"config": {key: _plain(_value(stage_config, key)) for key in stage.reads}, "inputs": inputs}


def why_stale(recorded: Any, stage: Stage, config: RunConfig, whole: Any = None) -> str | None:
    """The first difference between a folder's recorded sources and today's, in words; None where there is none.

    `whole`: the whole config that the folder was made with, for keys that an older release had but did not record.
    """
    today = sources(stage, config)
    if today is None:
        return "an input is not finished"
    if not isinstance(recorded, dict) or not all(isinstance(recorded.get(key), dict) for key in today):
        return "an older release made it and recorded nothing to compare"
    stage_config = _config_of_stage(stage, config)
    for key in stage.reads:
        if key in recorded["config"]:
            before = recorded["config"][key]
        elif (before := _at(whole, key)) is None:  # the older release did not have the key
            before = _default(stage_config, key)
        if change := _change(before, _value(stage_config, key), key):
            return change
    for name in [*today["inputs"], *recorded["inputs"]]:  # in the order of the stages, so always the same
        if today["inputs"].get(name) != recorded["inputs"].get(name):
            words = "has changed" if name in recorded["inputs"] else "was not read"
            return f"{name} {words}" if name in today["inputs"] else f"it read {name}"
    return None


def is_current(stage: Stage, config: RunConfig) -> bool:
    manifest = artifacts.read_manifest(config.path / stage.id)
    return manifest is not None and why_stale(manifest.get("sources"), stage, config, manifest.get("config")) is None


def dense_of_sweep(config: RunConfig) -> RunConfig:
    """The run that makes the dense model of `config`, a run of a sweep. Runs that train it the same way share it."""
    dense = find_stage(config, Kind.DENSE)
    # Without defaults, so that a release that adds keys finds the models of an older one.
    changed = config.model_dump(mode="json", exclude_defaults=True)
    keys = {key: value for key in dense.reads if (value := _at(changed, key)) is not None}
    outside = {name: _fingerprint(path) for name, path in _outside(dense, config).items()}
    digest = artifacts.digest([keys, outside])
    return config.model_copy(update={"name": f"dense-{digest[:8]}"})


def is_dense_of_sweep(config: RunConfig) -> bool:
    """Whether it is the run of a shared dense model, which has no other stages."""
    return not config.dense.path and config.name == dense_of_sweep(config).name


def _change(before: Any, now: Any, key: str) -> str | None:
    """The first key at or below `key` whose value differs."""
    if isinstance(now, Section) and isinstance(before, dict):
        before = now.in_present_names(before)
        changes = (_change(before.get(name, _plain(field.get_default(call_default_factory=True))), getattr(now, name),
                           f"{key}.{name}") for name, field in type(now).model_fields.items())
        return next(filter(None, changes), None)
    if isinstance(now, dict) and isinstance(before, dict) and now.keys() == before.keys():
        return next(filter(None, (_change(before[name], value, f"{key}.{name}") for name, value in now.items())), None)
    if before == _plain(now):
        return None
    return f"{key}: {_short(before)} -> {_short(_plain(now))}"


def _short(value: Any) -> str:
    return textwrap.shorten(json.dumps(value, ensure_ascii=False), 60, placeholder=" ...")


def _config_of_stage(stage: Stage, config: RunConfig) -> RunConfig:
    """The config with the one level or device of the stage in place of the list."""
    if stage.kind is Kind.PRUNE:
        return config.model_copy(update={"prune": config.prune.levels[stage.level]})
    if stage.kind is Kind.BENCHMARK:
        benchmark = config.benchmark.model_copy(update={"devices": (stage.device,)})
        return config.model_copy(update={"benchmark": benchmark})
    return config


def _value(config: RunConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


def _default(config: RunConfig, key: str) -> Any:
    parent, _, last = key.rpartition(".")
    section = _value(config, parent) if parent else config
    field = type(section).model_fields.get(last) if isinstance(section, Section) else None
    return _plain(field.get_default(call_default_factory=True)) if field and not field.is_required() else None


def _plain(value: Any) -> Any:
    """The value as JSON reads it back."""
    return json.loads(json.dumps(value, default=lambda section: section.model_dump(mode="json")))


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _outside(stage: Stage, config: RunConfig) -> dict[str, str]:
    """The paths outside the run that the stage reads, by config key or stage id."""
    calibration, mix = config.prune.calibration, config.task.mix
    paths = {"task.path": config.task.path, "model.path": config.model.path,
             "prune.calibration.path": calibration and calibration.path, "task.mix.task.path": mix and mix.task.path,
             **{f"evaluate.texts.{name}.path": text.path for name, text in config.evaluate.texts.items()}}
    external = {source.id: source.external for source in stage.inputs if source.external}
    return {**external, **{key: path for key, path in paths.items() if path and any(
        key.startswith(part) for part in stage.reads)}}


def _fingerprint(path: str) -> str:
    """A digest of names, sizes and times of a file or of a folder's files; reading a large model takes too long."""
    top = Path(path)
    files = [top] if top.is_file() else sorted(top.rglob("*"))
    return artifacts.digest([(str(file.relative_to(top)), (stat := file.stat()).st_size, stat.st_mtime_ns)
                             for file in files if file.is_file()])
