"""YAML 1.2's core schema: only true and false are booleans, 1e-4 is a number, 2:4 is text.

PyYAML implements YAML 1.1, where no and off are booleans and 12:30:00 is a number. A duplicate key is a mistake.
Aliases are refused, because a few lines of them can expand to billions of nodes.
"""

import re
from collections import Counter
from typing import Any, cast

import yaml
from yaml.constructor import ConstructorError, SafeConstructor

_MAX_DEPTH = 50
_TAG = "tag:yaml.org,2002:"


class NotYaml(ValueError):
    """The text is not valid YAML; the message is one line."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012 - as PyYAML declares it
    yaml_constructors = {_TAG + kind: SafeConstructor.yaml_constructors[_TAG + kind]  # noqa: RUF012
                         for kind in ("null", "bool", "str", "seq", "map")}
    _depth = 0

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise ConstructorError(None, None, f"aliases (*{event.anchor}) are not supported; give the value again, or "
                                   "share a file by `extends`", cast(Any, event.start_mark))
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise ConstructorError(None, None, f"it is nested more than {_MAX_DEPTH} deep", event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node, deep=False):
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ConstructorError(None, None, "a key must be one word", key.start_mark)
        for name, times in Counter(key.value for key, _ in node.value).items():
            if times > 1:
                last_mark = [key.start_mark for key, _ in node.value if key.value == name][-1]
                raise ConstructorError(None, None, f"the key {name} is given {times} times", last_mark)
        return super().construct_mapping(node, deep)

    def construct_text(self, node):
        text = self.construct_scalar(node)
        text.encode()  # a lone surrogate, "\\ud800", would otherwise fail only when it is written
        return text

    def construct_tuple(self, node):
        return tuple(self.construct_sequence(node, deep=True))

    def construct_number(self, node):
        text = self.construct_scalar(node)
        if re.fullmatch(r"[-+]?[0-9]+", text):
            return int(text)
        value = float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        # 1e3 is a number of steps as well.
        return int(value) if "." not in text and value.is_integer() and abs(value) < 2**53 else value


for _kind, _pattern, _first in (
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
        ("int", r"[-+]?[0-9]+", list("-+0123456789")),
        ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
         list("-+.0123456789"))):
    _Loader.add_implicit_resolver(_TAG + _kind, re.compile(f"^(?:{_pattern})$"), _first)
for _kind in ("int", "float"):
    _Loader.add_constructor(_TAG + _kind, _Loader.construct_number)
_Loader.add_constructor(_TAG + "str", _Loader.construct_text)
_Loader.add_constructor(_TAG + "seq", _Loader.construct_tuple)
_Loader.add_constructor(None, cast(Any, SafeConstructor.construct_undefined))


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would read as something else."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [resolver for kind in (_Loader, yaml.SafeDumper) for resolver in
                kind.yaml_implicit_resolvers.get(first, [])]
        for first in {**_Loader.yaml_implicit_resolvers, **yaml.SafeDumper.yaml_implicit_resolvers}}

    def ignore_aliases(self, data):
        return True


def read_yaml(text: str) -> Any:
    """Parse `text`; sequences become tuples, as in the schema. Raises NotYaml."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise NotYaml(f"{where}{error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError, LookupError) as error:  # the last two from a tag such as !!bool
        raise NotYaml(" ".join(str(error).split())) from error


def write_yaml(data: Any) -> str:
    """Plain data as YAML, with the keys in their order; read_yaml gives it back."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False)
