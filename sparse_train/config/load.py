"""Config files: YAML and overrides become a section of the schema.

    YAML file -> dotted key=value overrides -> RunConfig -> config.yaml in the run folder
"""

import itertools
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from sparse_train.config import RunConfig, Section
from sparse_train.config.mistakes import explain
from sparse_train.config.yaml_core import NotYaml, read_yaml, write_yaml
from sparse_train.errors import UserError

S = TypeVar("S", bound=Section)
_KEYS_OF_PLACE = {"name", "folder", "about"}  # overrides of these leave a run what it is
_LONGEST_NAME = 80  # of a combination of a sweep; a longer one is cut and gets a checksum


def load_config(schema: type[S], path: Path, overrides: Sequence[str] = (), prefix: str = "",
                others: Mapping[str, type[Section]] | None = None) -> S:
    """Read a YAML file into `schema` and apply the dotted `key=value` overrides. Raises UserError in one line.

    `extends: FILE` at the top of a file starts from that file, a path relative to this one; sections are merged key by
    key, and a key that is null takes its default, in an override too: `finetune.losses.kd=null` drops that loss.
    `about` describes the run of its own file only: it is dropped where another file extends it or an override changes
    anything but the run's place.

    `prefix` stands in front of each override's key, such as "cluster."; `others` are schemas that a key which is
    unknown here may belong to, by their prefix.
    """
    tree = _read_tree(Path(path))
    if {override.partition("=")[0] for override in overrides} - _KEYS_OF_PLACE:
        tree.pop("about", None)
    for override in overrides:
        _apply_override(tree, override, prefix)
    try:
        return schema.model_validate(tree, strict=True)  # strict: true is not 1
    except ValidationError as error:
        raise UserError(explain(error, schema, path, overrides, prefix, others or {})) from error


def load_points(path: Path, overrides: Sequence[str] = (),
                others: Mapping[str, type[Section]] | None = None) -> list[tuple[dict[str, Any], RunConfig]]:
    """(value of each swept key, config) of every combination of a recipe's `sweep`; without one, of the recipe."""
    whole = load_config(RunConfig, path, overrides, others=others)
    points: dict[str, tuple[dict[str, Any], RunConfig]] = {}
    for values in itertools.product(*whole.sweep.values()):
        point = dict(zip(whole.sweep, values, strict=True))
        config = load_config(RunConfig, path, [*overrides, *_overrides_of(point, whole)], others=others)
        if config.name in points:
            raise UserError(f"sweep: two combinations are called {config.name}; give each value once")
        points[config.name] = point, config
    return list(points.values())


def _overrides_of(point: Mapping[str, Any], whole: RunConfig) -> list[str]:
    """The swept keys' values and the place of that combination, as overrides, so that a mistake in one is reported as
    an override's is. YAML is a superset of JSON."""
    if not point:
        return []
    name = "_".join(f"{key.rpartition('.')[2]}-{value}" for key, value in point.items())
    name = re.sub("[^A-Za-z0-9._-]+", "-", name)
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}-{zlib.crc32(name.encode()):08x}"
    place = {"name": name, "sweep": {}, "folder": str(whole.path), "about": whole.about}
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in {**point, **place}.items()]


def load_frozen(path: Path) -> RunConfig:
    """The config in a run folder. A release without compress.loss compressed the last loss, so that is filled in."""
    tree = _read_tree(path)
    try:
        overrides = [] if "loss" in tree["compress"] else [f"compress.loss={list(tree['finetune']['losses'])[-1]}"]
    except (KeyError, TypeError, IndexError):  # not as a run leaves it
        overrides = []
    return load_config(RunConfig, path, overrides)


def dump_config(config: Section) -> str:
    return write_yaml(config.model_dump(mode="json"))


def _read_tree(path: Path, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A file's keys and those of the files that it extends."""
    try:
        tree = read_yaml(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except NotYaml as error:
        raise UserError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold a mapping of sections, not a {type(tree).__name__}")
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise UserError(f"{path}: extends must be the path of one file, not a {type(base).__name__}")
    if path.resolve() in extended_by:
        raise UserError(f"{path} extends itself")
    extended = _read_tree(path.parent / base, (*extended_by, path.resolve()))
    extended.pop("about", None)
    return _merge(extended, tree)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`, mapping by mapping; what is null in it is dropped."""
    merged = dict(base)
    for key, value in over.items():
        is_section = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if is_section else value
    return {key: value for key, value in merged.items() if value is not None}


def _apply_override(tree: dict[str, Any], override: str, prefix: str) -> None:
    key, equals, text = override.removeprefix(prefix).partition("=")
    if not equals or not key:
        raise UserError(f"{override!r} is not an override; write key=value, such as prune.sparsity=0.5")
    *sections, last = key.split(".")
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise UserError(f"{override!r}: {section} is a value, not a section")
    try:
        value = read_yaml(text)
    except NotYaml as error:
        raise UserError(f"{override!r}: the value is not valid YAML: {error}") from error
    if value is None and last in tree:
        del tree[last]
    else:
        tree[last] = value  # a null that removes nothing too: the schema knows whether there is such a key
