"""A mistake in a config as one line: the key and its value, the rule, the remedy."""

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import ValidationError

from sparse_train.config.base import Section

_LONGEST_VALUE = 80  # characters of a value that are shown
_ALTERNATIVES = {"float", "int", "str", "bool", "[key]"}  # pydantic names the alternative of a type that it tried
_RULES = {"model_type": "this is a section; give a mapping of its keys",
          "dict_type": "give a mapping, such as {name: value}",
          "tuple_type": "give a list, such as [a, b]",
          "finite_number": "infinity and NaN are no settings; give a number",
          "bool_type": "give true or false",
          "float_type": "give a number, such as 0.5",
          "int_type": "give a whole number",
          "string_type": "give text; a number, true and false are text in quotes"}


@dataclass(frozen=True)
class _Mistake:
    kind: str
    """pydantic's name of it."""
    path: list[str]
    """The key, part by part."""
    message: str
    value: Any


def explain(error: ValidationError, schema: type[Section], file: Path, overrides: Sequence[str], prefix: str,
            others: Mapping[str, type[Section]]) -> str:
    """`error` in one line, which begins with the override at fault, or with the file where none is.

    `prefix`: what stands in front of each override's key, such as "cluster."; `others`: schemas whose keys may have
    been meant, by their prefix.
    """
    mistake = _read(error)
    override = _find_override(mistake, [override.removeprefix(prefix) for override in overrides])
    if override is None:
        return f"{file}: {_describe(mistake, schema, '', others)}"
    key, given = prefix + ".".join(_key(override)), prefix + override
    assignment = given if _key(override) == mistake.path else None
    line = _describe(mistake, schema, prefix, others, assignment).removeprefix(f"{key}: ")
    return line if re.match(rf"{re.escape(given)}(?![\w.])", line) else f"{given}: {line}"


def describe(error: ValidationError, schema: type[Section], prefix: str) -> str:
    """`error` in one line that names the key; `prefix` is what stands in front of it, such as "prune.options."."""
    return _describe(_read(error), schema, prefix, {})


def _read(error: ValidationError) -> _Mistake:
    """The first mistake; where pydantic tried alternatives of a type, that of the one which got furthest."""
    errors = error.errors()
    path = _path(errors[0])
    furthest = max((one for one in errors if _path(one)[:len(path)] == path), key=lambda one: len(_path(one)))
    return _Mistake(furthest["type"], _path(furthest), furthest["msg"].removeprefix("Value error, "),
                    furthest["input"])


def _path(error: Any) -> list[str]:
    path = [str(part) for part in error["loc"] if not str(part).startswith("tuple[")]
    while path and path[-1] in _ALTERNATIVES:
        path.pop()
    return path


def _describe(mistake: _Mistake, schema: type[Section], prefix: str, others: Mapping[str, type[Section]],
              assignment: str | None = None) -> str:
    """`assignment`: key=value as the user wrote it, where that is what is wrong."""
    key = prefix + ".".join(mistake.path)
    if mistake.kind in ("extra_forbidden", "invalid_key"):
        return f"there is no key {key}; {_suggest(mistake.path, {prefix: schema, **others})}"
    if mistake.kind == "value_error":
        return _with_key(mistake, schema, prefix)
    if mistake.kind == "missing":
        return f"{key} is missing"
    rule = _RULES.get(mistake.kind, mistake.message[0].lower() + mistake.message[1:])
    return f"{assignment or f'{key}={_shorten(mistake.value)}'}: {rule}"


def _with_key(mistake: _Mistake, schema: type[Section], prefix: str) -> str:
    """A validator's message, its key in full: that of a section begins with a key of it, that of a key often with its
    name."""
    first_word = re.match(r"\w*", mistake.message)[0]  # type: ignore[index]  # it matches any text
    section = _section_at(schema, mistake.path)
    if section and first_word in section.model_fields:
        return prefix + ".".join([*mistake.path, mistake.message])
    if mistake.path and first_word == mistake.path[-1]:
        return prefix + ".".join([*mistake.path[:-1], mistake.message])
    return f"{prefix}{'.'.join(mistake.path)}: {mistake.message}" if mistake.path else mistake.message


def _shorten(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _LONGEST_VALUE else text[:_LONGEST_VALUE - 3] + "..."


def _find_override(mistake: _Mistake, overrides: Sequence[str]) -> str | None:
    """The last override of a key at, above or below the mistake's, preferably one that the message names."""
    near = [override for override in reversed(overrides)
            if all(part == other for part, other in zip(_key(override), mistake.path, strict=False))]
    for override in near:
        if re.search(rf"\b{re.escape(_key(override)[-1])}\b", mistake.message):
            return override
    return near[0] if near and mistake.path else None


def _key(override: str) -> list[str]:
    return override.partition("=")[0].split(".")


def _suggest(path: list[str], schemas: Mapping[str, type[Section]]) -> str:
    """A key of the last part's name anywhere, else one that is spelt like it; and the keys that are valid there."""
    *above, name = path
    prefix, schema = next(iter(schemas.items()))
    section = _section_at(schema, above)
    valid = sorted(section.model_fields) if section else []
    here = [(prefix + ".".join([*above, key])).split(".") for key in valid]
    everywhere = [(prefix + key).split(".") for prefix, schema in schemas.items() for key in _keys(schema)]
    for spelling, keys in ((name, everywhere), (_closest(name, here), here), (_closest(name, everywhere), everywhere)):
        if matches := [key for key in keys if key[-1] == spelling]:
            below = [key for key in matches if above and key[:len(here[0]) - 1] == here[0][:-1]] or matches
            nearest = [".".join(key) for key in below if len(key) == min(map(len, below))]
            guess = " or ".join(filter(None, [", ".join(nearest[:-1]), nearest[-1]]))
            return f"did you mean {guess}? (valid here: {', '.join(valid)})"
    return f"valid here: {', '.join(valid)}"


def _closest(name: str, keys: list[list[str]]) -> str | None:
    last_parts = sorted({key[-1] for key in keys})
    return next(iter(difflib.get_close_matches(name, last_parts, n=1, cutoff=0.7)), None)


def _section_in(annotation: Any) -> type[Section] | None:
    """The section that a key, or each value of its mapping, is."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)


def _section_at(schema: type[Section], path: list[str]) -> type[Section] | None:
    """The section that `path` leads to; a mapping's own keys (a loss's name) lead into it."""
    section: type[Section] | None = schema
    parts = iter(path)
    for part in parts:
        field = section.model_fields.get(part) if section else None
        if field is None:
            return None
        if get_origin(field.annotation) is dict:
            next(parts, None)
        section = _section_in(field.annotation)
    return section


def _keys(schema: type[Section]) -> Iterator[str]:
    """Dotted keys of a schema, sections and what they hold; NAME stands for the keys of a mapping."""
    for name, field in schema.model_fields.items():
        yield name
        if section := _section_in(field.annotation):
            below = f"{name}.NAME" if get_origin(field.annotation) is dict else name
            yield from (f"{below}.{key}" for key in _keys(section))
