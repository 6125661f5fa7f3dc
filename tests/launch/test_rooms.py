"""The rooms of launch/ are floors: each imports only from those below it."""

import ast
from pathlib import Path

import pytest

_LAUNCH = Path(__file__).parents[2] / "launch"
_BELOW = {"monitor": {"worker", "run"}, "submit": {"worker", "run"}, "worker": {"run"}, "run": set()}


def _imports(file):
    """Modules below sparse_train.launch that it imports anywhere, also inside functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("sparse_train.launch"):
            yield from (f"{node.module}.{alias.name}".removeprefix("sparse_train.launch.") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("sparse_train.launch.") for alias in node.names
                        if alias.name.startswith("sparse_train.launch"))


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
