"""A copy of the code as it was at submission, so that editing the checkout changes no queued or requeued job.

    RUN/code/sparse_train         a copy as a wheel lays it out: launch, jobs, configs and native kernels inside
    RUN/code/sitecustomize.py     makes Python import the copy rather than an editable install

Jobs find it through PYTHONPATH. Other packages are those of the environment; each manifest has their versions.
"""

import os
import shutil
from pathlib import Path

import sparse_train
from sparse_train.launch.run.recipes import CONFIGS

_INSIDE = ("launch", "jobs", "configs")  # the package once installed; in a checkout they are beside it
_CUSTOMIZE = '''"""An editable install puts its finder before the path; jobs of this run take the copy beside this."""

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__module__.startswith(("_editable_", "__editable__"))]
# This one hides the site's own, such as EasyBuild's, which finds the modules that are loaded.
_here = os.path.dirname(os.path.abspath(__file__))
_spec = PathFinder.find_spec("sitecustomize", [p for p in sys.path if os.path.abspath(p) != _here])
if _spec and _spec.loader:
    _spec.loader.exec_module(module_from_spec(_spec))
'''


def freeze_code(run: Path) -> Path:
    """Copy the code to `run`/code, replacing an earlier copy; returns that folder."""
    from sparse_train.kernels import _native

    top, final, partial = CONFIGS.parent, run / "code", run / f".code.{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    package, ignored = partial / "sparse_train", shutil.ignore_patterns("__pycache__", "csrc")
    shutil.copytree(Path(sparse_train.__file__).parent, package, ignore=ignored)
    for name in _INSIDE:
        shutil.copytree(top / name, package / name, ignore=ignored, dirs_exist_ok=True)
    shutil.copy2(_native.__file__, package / "kernels")
    (partial / "sitecustomize.py").write_text(_CUSTOMIZE, encoding="utf-8")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    return final
