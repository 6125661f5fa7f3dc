"""Imports point one way: the rooms of launch/ and of sparse_train/ are floors, and each imports from those below it."""

import ast
import re
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]
_LAUNCH = _ROOT / "launch"
_BELOW = {"model": set(), "monitor": {"worker", "run"}, "submit": {"worker", "run"}, "worker": {"run"}, "run": set()}


def _imports(file, package="sparse_train.launch"):
    """Modules below `package` that it imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        modules = []
        if isinstance(node, ast.ImportFrom) and node.module:
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        yield from (module.removeprefix(f"{package}.") for module in modules if module.startswith(f"{package}."))


@pytest.mark.parametrize("room", _BELOW)
def test_a_room_imports_from_those_below_it_only(room):
    files = sorted((_LAUNCH / room).glob("*.py"))
    upward = {f"{file.name}: {module}" for file in files for module in _imports(file)
              if module.partition(".")[0] not in {room, *_BELOW[room]}}
    assert len(files) > 1 and not upward


def test_this_machine_and_slurm_do_not_need_each_other():
    found = {name: set(_imports(_LAUNCH / "submit" / f"{name}.py")) for name in ("local", "slurm")}
    assert not any(module.startswith("submit.slurm") for module in found["local"])
    assert not any(module.startswith(("submit.local", "submit.processes")) for module in found["slurm"])


def _floors():
    """Room of sparse_train -> its row in the table of docs/design.md, from the top."""
    text = (_ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    table = text.partition("| room of `sparse_train/` |")[2].partition("\n\n")[0]
    return {room: number for number, row in enumerate(table.splitlines()[2:])
            for room in re.findall(r"`(\w+)(?:/|\.py)`", row.split("|")[1])}


def _room_of(file):
    return file.relative_to(_ROOT / "sparse_train").parts[0].removesuffix(".py")


def test_a_room_of_the_library_imports_from_its_row_and_those_below_it_only():
    floors, files = _floors(), sorted((_ROOT / "sparse_train").glob("*/**/*.py"))
    files += [file for file in (_ROOT / "sparse_train").glob("*.py") if file.name != "__init__.py"]
    assert {_room_of(file) for file in files} == set(floors)
    imports = {(file, module.partition(".")[0]) for file in files for module in _imports(file, "sparse_train")}
    upward = {f"{file}: {room}" for file, room in imports
              if floors.get(room, -1) < floors[_room_of(file)]}  # jobs and launch are above all of them
    assert imports and not upward
