"""A mistake in a config as one line: the key and its value, the rule, the remedy."""

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args, get_origin

from pydantic import ValidationError

from sparse_train.config import Section

_OF_PYDANTIC = {"float", "int", "str", "bool", "[key]"}  # which alternative of a type it tried
_SAID = {"model_type": "this is a section; give a mapping of its keys",
         "dict_type": "give a mapping, such as {name: value}",
         "tuple_type": "give a list, such as [a, b]",
         "finite_number": "infinity and NaN are no settings; give a number",
         "bool_type": "give true or false",
         "float_type": "give a number, such as 0.5",
         "int_type": "give a whole number",
         "string_type": "give text; a number, true and false are text in quotes"}


def told(error: ValidationError, schema: type[Section], overrides: Sequence[str], under: str,
         others: dict[str, type[Section]]) -> tuple[str | None, str]:
    """(the override that it is in, None for the file; what is wrong).

    `under`: what stands in front of each override's key; `others`: schemas whose keys may have been meant, by prefix.
    """
    errors = error.errors()
    place = _location(errors[0])
    # Of the alternatives that were tried, the one that got furthest.
    first = max((one for one in errors if _location(one)[:len(place)] == place), key=lambda one: len(_location(one)))
    place, message = _location(first), first["msg"].removeprefix("Value error, ")
    override = _culprit(place, message, [one.removeprefix(under) for one in overrides])
    prefix = "" if override is None else under
    key = prefix + ".".join(place)
    if first["type"] in ("extra_forbidden", "invalid_key"):
        said = f"there is no key {key}; {_meant(place, {prefix: schema, **others})}"
    elif first["type"] == "value_error":
        said = _joined(place, message, schema, prefix)
    elif first["type"] == "missing":
        said = f"{key} is missing"
    else:
        given = f"{key}={_shown(first['input'])}" if override is None or _parts(override) != place else under + override
        said = f"{given}: {_SAID.get(first['type'], message[0].lower() + message[1:])}"
    return override and under + override, said


def _location(error) -> list[str]:
    found = [str(part) for part in error["loc"] if not str(part).startswith("tuple[")]
    while found and found[-1] in _OF_PYDANTIC:
        found.pop()
    return found


def _joined(place: list[str], message: str, schema: type[Section], prefix: str) -> str:
    """Messages of a section start with a key of it, those of a key often with its name."""
    word = re.match(r"\w*", message)[0]
    section = _section_at(schema, place)
    if section and word in section.model_fields:
        return prefix + ".".join([*place, message])
    if place and word == place[-1]:
        return prefix + ".".join([*place[:-1], message])
    return f"{prefix}{'.'.join(place)}: {message}" if place else message


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _culprit(place: list[str], message: str, overrides: Sequence[str]) -> str | None:
    """The last override of a key at, above or below `place`, rather one that is named."""
    def is_named(override: str) -> bool:
        return re.search(rf"\b{re.escape(_parts(override)[-1])}\b", message) is not None

    near = [override for override in reversed(overrides)
            if all(mine == theirs for mine, theirs in zip(_parts(override), place, strict=False))]
    return next(filter(is_named, near), near[0] if near and place else None)


def _parts(override: str) -> list[str]:
    return override.partition("=")[0].split(".")


def _meant(place: list[str], schemas: dict[str, type[Section]]) -> str:
    """A key of the last one's name anywhere, else one that is spelt like it; and the keys that are valid there."""
    *above, name = place
    prefix, schema = next(iter(schemas.items()))
    valid = sorted(_section_at(schema, above).model_fields)
    here = [_parts(prefix + ".".join([*above, key])) for key in valid]
    keys = [_parts(prefix + key) for prefix, schema in schemas.items() for key in _keys(schema)]
    for wanted, among in ((name, keys), (_close(name, here), here), (_close(name, keys), keys)):
        if meant := [key for key in among if key[-1] == wanted]:
            below = [key for key in meant if above and key[:len(here[0]) - 1] == here[0][:-1]] or meant
            nearest = [".".join(key) for key in below if len(key) == min(map(len, below))]
            guess = " or ".join(filter(None, [", ".join(nearest[:-1]), nearest[-1]]))
            return f"did you mean {guess}? (valid here: {', '.join(valid)})"
    return f"valid here: {', '.join(valid)}"


def _close(name: str, keys: list[list[str]]) -> str | None:
    return next(iter(difflib.get_close_matches(name, sorted({key[-1] for key in keys}), n=1, cutoff=0.7)), None)


def _section_in(annotation: Any) -> type[Section] | None:
    """The section that a key, or each value of its mapping, is."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)


def _section_at(schema: type[Section], place: list[str]) -> type[Section] | None:
    """The section that `place` leads to; a mapping's own keys (a loss's name) lead into it."""
    section: type[Section] | None = schema
    parts = iter(place)
    for part in parts:
        field = section.model_fields.get(part) if section else None
        if field is None:
            return None
        if get_origin(field.annotation) is dict:
            next(parts, None)
        section = _section_in(field.annotation)
    return section


def _keys(schema: type[Section]) -> Iterator[str]:
    for name, field in schema.model_fields.items():
        yield name
        if section := _section_in(field.annotation):
            own = ".NAME" if get_origin(field.annotation) is dict else ""
            yield from (f"{name}{own}.{key}" for key in _keys(section))
