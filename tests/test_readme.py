"""What the README names is there: every folder of its tree, every file, every command and option. So are the files and
functions that the other pages name."""

import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from sparse_train.bench.peers import PEERS
from sparse_train.launch.cli import main

TOP = Path(__file__).parents[1]
TEXT = (TOP / "README.md").read_text()
PAGES = "\n".join(page.read_text(encoding="utf-8")
                  for page in (TOP / "README.md", TOP / "CONTRIBUTING.md", *(TOP / "docs").glob("*.md")))
SOURCES = [path for top in ("jobs", "launch", "slurm", "sparse_train", "tests") for path in (TOP / top).rglob("*.*")]


def _doors():
    """(module of a room, name that the tree says to import from it)."""
    parent = ""
    for line in TEXT.partition("## The tree\n")[2].splitlines():
        if match := re.match(r" {4}(\S+)/ ", line):
            parent = {"launch": "sparse_train.launch", "sparse_train": "sparse_train"}.get(match[1], "")
        elif match := re.match(r" {6}(\S+)/ .*\| (.*)", line):
            yield from ((f"{parent}.{match[1]}", name) for name in match[2].split(", "))


@pytest.mark.parametrize(("room", "name"), _doors())
def test_a_door_is_there(room, name):
    assert hasattr(import_module(room), name) or find_spec(f"{room}.{name}")


def _tree():
    block = TEXT.partition("## The tree\n")[2]
    parent = ""
    for indent, name in re.findall(r"^( {4,})(\S+)/ ", block, re.MULTILINE):
        if len(indent) == 4:
            parent = name
        yield name if len(indent) == 4 else f"{parent}/{name}"


def test_the_tree_is_the_tree():
    named = set(_tree())
    assert {"jobs", "launch", "configs", "sparse_train", "tests", "slurm", "docs"} <= named
    assert all((TOP / name).is_dir() for name in named)
    rooms = {f"{top}/{path.parent.name}" for top in ("sparse_train", "launch")
             for path in (TOP / top).glob("*/__init__.py")}
    assert rooms <= named


@pytest.mark.parametrize("path", sorted(set(re.findall(r"(?:configs|docs|sparse_train)/[\w/-]+\.\w+", TEXT))))
def test_a_named_file_exists(path):
    assert (TOP / path).is_file()


@pytest.mark.parametrize("name", sorted(
    set(re.findall(r"[\w./-]*\w\.(?:py|cpp|sh|sbatch)\b|csrc/\w+\.h\b", PAGES)) - PEERS.keys()))
def test_a_source_file_that_a_page_names_exists(name):
    assert "NAME" in name or any(f"/{path}".endswith(f"/{name}") for path in SOURCES)


@pytest.mark.parametrize(("file", "function"), sorted(set(re.findall(r"([\w/]+\.py):([\w.]+)", PAGES))))
def test_a_function_that_a_page_names_exists(file, function):
    assert re.search(rf"^ *(def|class) {function.rpartition('.')[2]}\b", (TOP / file).read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", sorted({word for word in re.findall(r"sparse-train (\w+)", TEXT)
                                            if word not in ("bench", "gets")}))
def test_a_named_command_exists_with_its_options(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    for line in re.findall(rf"^ +sparse-train {command} .*", TEXT, re.MULTILINE):
        assert all(option in shown for option in re.findall(r"--[a-z-]+", line)), line


def test_make_has_the_two_commands():
    targets = re.findall(r"^(\w+):", (TOP / "Makefile").read_text(), re.MULTILINE)
    assert {"demo", "test"} <= set(targets)
