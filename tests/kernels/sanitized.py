"""A plugin of pytest, which `make test-sanitize` names: the native module of build/sanitize takes the place of the
installed one. It is loaded before anything imports the kernels."""

import importlib.util
import sys
from pathlib import Path

_NAME = "sparse_train.kernels._native"
(_built,) = (Path(__file__).parents[2] / "build" / "sanitize").glob("_native.*.so")
_spec = importlib.util.spec_from_file_location(_NAME, _built)
assert _spec is not None and _spec.loader is not None
sys.modules[_NAME] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules[_NAME])
