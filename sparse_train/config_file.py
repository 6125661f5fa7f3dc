"""Config files: YAML and overrides become a section of the schema, and a mistake becomes one line.

    YAML file -> dotted key=value overrides -> RunConfig -> config.yaml in the run folder
"""

import difflib
import itertools
import json
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from sparse_train.config import RunConfig, Section
from sparse_train.errors import UserError

S = TypeVar("S", bound=Section)


class _Loader(yaml.SafeLoader):
    """YAML 1.2's integers: in PyYAML's 1.1 the pattern 2:4 is a number of base 60."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regex) for tag, regex in resolvers if tag != "tag:yaml.org,2002:int"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?\d+$"), list("-+0123456789"))

def load_config(schema: type[S], path: Path, overrides: list[str] | tuple[str, ...] = ()) -> S:
    """Read a YAML file into `schema`, the dotted `key=value` overrides laid over it. Raises UserError in one line.

    `extends: FILE` at a file's top starts from that one, a path relative to it; sections are merged key by key, and a
    key that is null there takes its default.
    """
    tree = _read_tree(Path(path))
    for override in overrides:
        _lay_over(tree, override)
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        location, said = _one_line(error, schema)
        raise UserError(f"{_culprit(location, overrides) or path}: {said}") from error


def load_points(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> list[tuple[dict[str, Any], RunConfig]]:
    """(value of each swept key, config) of every combination of a recipe's `sweep`; one, with no key, without it."""
    whole = load_config(RunConfig, path, overrides)
    found: dict[str, tuple[dict[str, Any], RunConfig]] = {}
    for values in itertools.product(*whole.sweep.values()):
        point = dict(zip(whole.sweep, values, strict=True))
        # As overrides, so that a mistake is told as theirs is; YAML is a superset of JSON.
        given = [f"{key}={json.dumps(value)}" for key, value in point.items()]
        if point:
            name = "_".join(f"{key.rpartition('.')[2]}-{value}" for key, value in point.items())
            given += [f"name={json.dumps(re.sub('[^A-Za-z0-9._-]+', '-', name))}", "sweep={}",
                      f"folder={json.dumps(str(whole.path))}"]
        config = load_config(RunConfig, path, [*overrides, *given])
        if config.name in found:
            raise UserError(f"sweep: two combinations are called {config.name}; give each value once")
        found[config.name] = point, config
    return list(found.values())


def _read_tree(path: Path, seen: tuple[Path, ...] = ()) -> dict:
    try:
        tree = yaml.load(path.read_text(), _Loader) or {}
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold a mapping of sections, not a {type(tree).__name__}")
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if path.resolve() in seen:
        raise UserError(f"{path} extends itself")
    return _merged(_read_tree(path.parent / str(base), (*seen, path.resolve())), tree)


def _merged(base: dict, over: dict) -> dict:
    merged = base | {key: _merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict)
                     else value for key, value in over.items()}
    return {key: value for key, value in merged.items() if value is not None}


def dump_config(config: Section) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _lay_over(tree: dict, override: str) -> None:
    key, equals, text = override.partition("=")
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
        tree[last] = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{override!r}: the value is not valid YAML") from error


def _culprit(location: list[str], overrides: list[str] | tuple[str, ...]) -> str | None:
    """The last override of a key at, above or below `location`."""
    for override in reversed(overrides):
        key = override.partition("=")[0].split(".")
        if location and all(mine == theirs for mine, theirs in zip(key, location, strict=False)):
            return override
    return None


def _one_line(error: ValidationError, schema: type[Section]) -> tuple[list[str], str]:
    """(where, what) of the first mistake."""
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    while location and (location[-1] in _OF_PYDANTIC or location[-1].startswith("tuple[")):
        location.pop()
    return location, _told(first, location, schema)


_OF_PYDANTIC = {"float", "int", "str", "bool", "[key]"}  # which alternative of a type it tried


def _told(first: Any, location: list[str], schema: type[Section]) -> str:
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        valid = sorted(_fields_at(schema, location[:-1]))
        near = difflib.get_close_matches(location[-1], valid, n=1, cutoff=0)
        return f"there is no key {key}; did you mean {near[0]}? (valid here: {', '.join(valid)})"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{key}: {message}" if key else message
    if first["type"] == "missing":
        return f"{key} is missing"
    if first["type"] == "model_type":
        message = "this is a section; give a mapping of its keys"
    return f"{key}={first['input']!r}: {message[0].lower()}{message[1:]}"


def _fields_at(schema: Any, location: list[str]) -> list[str]:
    """The valid keys of the section that `location` leads to; a mapping's own keys (a loss's name) lead into it."""
    for part in location:
        if isinstance(schema, type) and issubclass(schema, Section):
            schema = schema.model_fields[part].annotation
        else:
            schema = schema.__args__[1]
        for choice in getattr(schema, "__args__", ()):
            if isinstance(choice, type) and issubclass(choice, Section) and not hasattr(schema, "__origin__"):
                schema = choice
                break
    return list(schema.model_fields)
