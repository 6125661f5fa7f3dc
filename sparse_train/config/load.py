"""Config files: YAML and overrides become a section of the schema, and a mistake becomes one line.

    YAML file -> dotted key=value overrides -> RunConfig -> config.yaml in the run folder
"""

import itertools
import json
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from sparse_train.config import RunConfig, Section
from sparse_train.config.mistakes import told
from sparse_train.config.yaml_core import NotYaml, read_yaml, write_yaml
from sparse_train.errors import UserError

S = TypeVar("S", bound=Section)
_SAME_RUN = {"name", "folder", "about"}
_LONGEST_NAME = 80  # of a combination; beyond it a checksum tells them apart


def load_config(schema: type[S], path: Path, overrides: Sequence[str] = (), under: str = "",
                others: dict[str, type[Section]] | None = None) -> S:
    """Read a YAML file into `schema`, the dotted `key=value` overrides laid over it. Raises UserError in one line.

    `extends: FILE` at a file's top starts from that one, a path relative to it; sections are merged key by key, and a
    key that is null there takes its default. `about` is true of its own file's run: neither a file that extends it nor
    an override of anything but the run's place keeps it.

    `under` stands in front of each override's key, such as "cluster."; `others` are schemas that a key which is unknown
    here may belong to, by that prefix.
    """
    tree = _read_tree(Path(path))
    if {override.partition("=")[0] for override in overrides} - _SAME_RUN:
        tree.pop("about", None)
    for override in overrides:
        _lay_over(tree, override, under)
    try:
        return schema.model_validate(tree, strict=True)  # strictly: true is not 1
    except ValidationError as error:
        override, said = told(error, schema, overrides, under, others or {})
        if override is None:
            raise UserError(f"{path}: {said}") from error
        repeats = re.match(rf"{re.escape(override)}(?![\w.])", said)
        raise UserError(said if repeats else f"{override}: {said}") from error


def load_points(path: Path, overrides: Sequence[str] = (),
                others: dict[str, type[Section]] | None = None) -> list[tuple[dict[str, Any], RunConfig]]:
    """(value of each swept key, config) of every combination of a recipe's `sweep`; one, with no key, without it."""
    whole = load_config(RunConfig, path, overrides, others=others)
    found: dict[str, tuple[dict[str, Any], RunConfig]] = {}
    for values in itertools.product(*whole.sweep.values()):
        point = dict(zip(whole.sweep, values, strict=True))
        # As overrides, so that a mistake is told as theirs is; YAML is a superset of JSON.
        given = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in point.items()]
        if point:
            name = "_".join(f"{key.rpartition('.')[2]}-{value}" for key, value in point.items())
            name = re.sub("[^A-Za-z0-9._-]+", "-", name)
            if len(name) > _LONGEST_NAME:
                name = f"{name[:_LONGEST_NAME]}-{zlib.crc32(name.encode()):08x}"
            given += [f"name={json.dumps(name)}", "sweep={}",
                      f"folder={json.dumps(str(whole.path), ensure_ascii=False)}",
                      f"about={json.dumps(whole.about, ensure_ascii=False)}"]
        config = load_config(RunConfig, path, [*overrides, *given], others=others)
        if config.name in found:
            raise UserError(f"sweep: two combinations are called {config.name}; give each value once")
        found[config.name] = point, config
    return list(found.values())


def load_frozen(path: Path) -> RunConfig:
    """The config that a run folder holds, also of a release without compress.loss, which took the last loss."""
    tree = _read_tree(path)
    try:
        older = [] if "loss" in tree["compress"] else [f"compress.loss={list(tree['finetune']['losses'])[-1]}"]
    except (KeyError, TypeError, IndexError):  # not as a run leaves it
        older = []
    return load_config(RunConfig, path, older)


def dump_config(config: Section) -> str:
    return write_yaml(config.model_dump(mode="json"))


def _read_tree(path: Path, seen: tuple[Path, ...] = ()) -> dict:
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
    if path.resolve() in seen:
        raise UserError(f"{path} extends itself")
    below = _read_tree(path.parent / base, (*seen, path.resolve()))
    below.pop("about", None)
    return _merged(below, tree)


def _merged(base: dict, over: dict) -> dict:
    merged = base | {key: _merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict)
                     else value for key, value in over.items()}
    return {key: value for key, value in merged.items() if value is not None}


def _lay_over(tree: dict, override: str, under: str) -> None:
    key, equals, text = override.removeprefix(under).partition("=")
    if not equals or not key:
        raise UserError(f"{override!r} is not an override; write key=value, such as prune.sparsity=0.5")
    *parents, last = key.split(".")
    for parent in parents:
        if tree.get(parent) is None:
            tree[parent] = {}
        tree = tree[parent]
        if not isinstance(tree, dict):
            raise UserError(f"{override!r}: {parent} is a value, not a section")
    try:
        tree[last] = read_yaml(text)
    except NotYaml as error:
        raise UserError(f"{override!r}: the value is not valid YAML: {error}") from error
