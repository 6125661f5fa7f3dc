"""A missing optional dependency is one line that says what to install."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from sparse_train.errors import UserError
from sparse_train.extras import EXTRAS, require


def test_the_extras_are_those_of_pyproject():
    declared = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = declared["optional-dependencies"]
    assert {extra: tuple(extras[extra]) for extra in extras if extra not in ("all", "test")} == EXTRAS
    assert extras["all"] == [f"sparse-train[{','.join(EXTRAS)}]"]
    assert not {name for names in EXTRAS.values() for name in names} & set(declared["dependencies"])


@pytest.mark.parametrize("extra", EXTRAS)
def test_a_missing_package_is_named_with_its_extra(extra, monkeypatch):
    require(extra)
    monkeypatch.setitem(sys.modules, EXTRAS[extra][-1], None)
    with pytest.raises(UserError) as caught:
        require(extra)
    assert str(caught.value) == f"{EXTRAS[extra][-1]} not installed; pip install 'sparse-train[{extra}]'"


def test_models_are_loaded_and_exported_without_deepspeed():
    """A server's environment has none."""
    script = ("import sys; sys.modules['deepspeed'] = None\n"
              "import sparse_train.inference, sparse_train.compress, sparse_train.bench.layers")
    subprocess.run([sys.executable, "-c", script], check=True)
