"""The package as a wheel installs it, used in a folder that has no checkout around it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
_TOP = Path(__file__).parents[2]
_SMALL = ("model.d_model=32", "model.n_layers=2", "model.n_heads=2", "dense.steps=6", "dense.batch_size=8",
          "finetune.steps=4", "finetune.batch_size=8", "finetune.losses={squarehead: {feature_weight: 1}}",
          "evaluate.num_examples=4", "evaluate.max_new_tokens=8", "benchmark.repeats=1", "benchmark.new_tokens=4",
          "benchmark.reference_layers=none")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index",
                    "-C", f"build-dir={folder / 'build'}", "-w", folder, _TOP], check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def command(wheel, tmp_path_factory):
    """(runs the sparse-train of an environment of its own, the folder that it runs in).

    The environment shares the dependencies of this one, not its editable install; the folder has files with names of
    packages."""
    environment, here = tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("elsewhere")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    shared = [path for path in sys.path if path.endswith("site-packages")]
    site = next(environment.glob("lib/python*/site-packages"))
    (site / "shared.pth").write_text("".join(f"{path}\n" for path in shared))
    subprocess.run([sys.executable, "-m", "pip", "--python", environment / "bin" / "python", "install", "-q",
                    "--no-deps", "--no-index", "--force-reinstall", wheel], check=True)
    for name in ("random", "torch", "sparse_train"):
        (here / f"{name}.py").write_text("raise ImportError('a file of the user')")
    tools = here / "tools"  # what a login node has
    tools.mkdir()
    for name in ("sbatch", "srun"):
        (tools / name).write_text("#!/bin/sh\nexit 1\n")
        (tools / name).chmod(0o755)

    def run(*arguments):
        done = subprocess.run([environment / "bin" / "sparse-train", *arguments], cwd=here, capture_output=True,
                              env={**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}, timeout=500, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run, here


def test_no_generic_name_lands_in_site_packages_and_recipes_are_inside(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"sparse_train"}
    recipes = {str(file.relative_to(_TOP)) for file in (_TOP / "configs").rglob("*.yaml")}
    assert {name.removeprefix("sparse_train/") for name in names if name.endswith(".yaml")} == recipes
    assert any(name.startswith("sparse_train/kernels/_native.") for name in names)
    assert {"sparse_train/py.typed", "sparse_train/jobs/report.html.jinja"} <= set(names)


def test_the_demo_runs_by_its_name(command):
    run, here = command
    shown = run("run", "demo", *_SMALL)
    assert "report:" in shown and (here / "runs" / "demo" / "report" / "DONE").is_file()
    assert run("status", "runs/demo").count("done in") == 7
    log = next((here / "runs" / "demo" / "logs" / "dense").glob("*_0_log.out")).read_text()
    # The dependencies may well be below the checkout, in its .venv.
    assert not [room for room in ("sparse_train", "jobs", "launch") if f"{_TOP / room}{os.sep}" in log]


def test_measuring_and_submitting_work(command):
    run, here = command
    assert '"ranks": 2' in run("bench", "train", "--json", "--d-model", "64", "--n-layers", "1", "--num-tokens", "16",
                               "--repeats", "1")
    shown = run("run", "demo", "name=other", "--on", "slurm", "--dry-run")
    assert "#SBATCH" in shown and "sparse_train.launch.worker.requeue" in shown
    prepared = run("run", "demo", "name=other", "--on", "slurm", "--prepare").splitlines()
    assert prepared[0] == str(here / "runs" / "other") and prepared[1].split("\t")[0] == "dense"
    code = here / "runs" / "other" / "code" / "sparse_train"
    found = subprocess.run(
        [sys.executable, "-P", "-c", "from sparse_train import kernels; from sparse_train.launch.run import recipes; "
         "print(recipes.CONFIGS, kernels._native.__file__)"], env={**os.environ, "PYTHONPATH": str(code.parent)},
        capture_output=True, text=True, check=True).stdout.split()
    assert all(Path(path).is_relative_to(code) for path in found)
