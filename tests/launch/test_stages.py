"""When a finished stage is current, why it is not, and what may take its place."""

import importlib
import logging
from fnmatch import fnmatch
from pathlib import Path

import pytest
from sparse_train.jobs.job import Job
from sparse_train.launch import runner
from sparse_train.launch.cli import main
from sparse_train.launch.stages import build_stages, find_stage, input_paths, sources, why_stale

from sparse_train import artifacts
from sparse_train.config import PruneConfig, RunConfig, Section, TaskConfig
from sparse_train.config_file import load_config
from sparse_train.errors import UserError
from tests.ranks import run_ranks

RECIPE = Path(__file__).with_name("tiny.yaml")
# Which stages read a key themselves; what follows them is stale by its inputs. First match counts.
READERS = {
    "name": "benchmark report",
    "about": "report",
    "seed": "dense finetune",
    "task.name": "dense prune finetune evaluate compress benchmark report",
    "task.language": "dense prune finetune evaluate compress benchmark",
    "task.shots": "evaluate compress benchmark",
    "task.test_prompt": "evaluate compress benchmark",
    "task.max_bad_share": "",
    "task.*": "dense prune finetune evaluate compress benchmark",
    "model.*": "dense",
    "*.zero.*": "", "*.sequence_parallel": "", "*.activation_checkpointing": "", "*.checkpoint*": "", "*.log_every": "",
    "dense.path": "",  # another graph, whose stages have another input
    "dense.*": "dense",
    "prune.sparsity": "prune benchmark report",
    "prune.*": "prune report",
    "finetune.teacher.precision": "finetune",
    "finetune.teacher.*": "",
    "finetune.steps": "finetune report",
    "finetune.num_examples": "finetune report",
    "finetune.*": "finetune",
    "evaluate.*": "evaluate compress",
    "compress.precisions": "compress benchmark",
    "compress.loss": "compress benchmark report",  # takes another input
    "benchmark.*": "benchmark",
    "folder": "", "tracking.*": "", "sweep": "",
}


def _config(folder, *overrides):
    return load_config(RunConfig, RECIPE, [f"folder='{folder}'", *overrides])


def _finish(config):
    """Each stage as a signed folder with a file in it."""
    for stage in build_stages(config):
        folder = config.path / stage.id
        folder.mkdir(parents=True)
        (folder / "result").write_text(stage.id)
        artifacts.sign(folder, {"stage": stage.id, "sources": sources(stage, config), "seconds": 1.0})


def _leaves(section, prefix=""):
    """Dotted key and value of every key of the schema."""
    for name in type(section).model_fields:
        value, key = getattr(section, name), f"{prefix}{name}"
        if isinstance(value, Section):
            yield from _leaves(value, f"{key}.")
        elif isinstance(value, dict) and value:
            for item, below in value.items():
                yield from _leaves(below, f"{key}.{item}.")
        else:
            yield key, value


def _with(section, key, value):
    first, _, rest = key.partition(".")
    below = section[first] if isinstance(section, dict) else getattr(section, first)
    new = _with(below, rest, value) if rest else value
    return {**section, first: new} if isinstance(section, dict) else section.model_copy(update={first: new})


def _another(key, tmp_path):
    special = {"prune.sparsity": 0.5, "prune.method": "magnitude", "prune.calibration": TaskConfig(name="numbers"),
               "benchmark.devices": ("gpu",), "compress.loss": "ce",
               "folder": str(tmp_path / "moved")}
    return 0.5 if key.endswith("_weight") else special.get(key, "another")


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # "another" is no number
def test_a_changed_key_makes_those_stages_stale_that_read_it(tmp_path):
    config = _config(tmp_path)
    _finish(config)
    (tmp_path / "moved").symlink_to(tmp_path)
    (tmp_path / "another").symlink_to(tmp_path / "tiny")
    wrong = {}
    for key, _ in _leaves(config):
        if key == "dense.path":  # makes another graph
            continue
        changed = _with(config, key, _another(key, tmp_path))
        found = {stage.job for stage in build_stages(changed)
                 if why_stale(artifacts.read_manifest(config.path / stage.id)["sources"], stage, changed)}
        expected = next(jobs for pattern, jobs in READERS.items() if fnmatch(key, pattern))
        if found != set(expected.split()):
            wrong[key] = f"{sorted(found)}, not {expected}"
    assert not wrong


def test_keys_of_a_newer_release_make_nothing_stale_unless_they_are_set(tmp_path):
    config = _config(tmp_path)
    _finish(config)
    stage = find_stage(config, "finetune/squarehead")
    recorded = artifacts.read_manifest(config.path / stage.id)["sources"]
    del recorded["config"]["finetune.clip"], recorded["config"]["finetune.losses.squarehead"]["temperature"]
    assert why_stale(recorded, stage, config) is None
    assert why_stale(recorded, stage, _with(config, "finetune.clip", 2.0)) == "finetune.clip: 1.0 -> 2.0"
    warm = _with(config, "finetune.losses.squarehead.temperature", 2.0)
    assert why_stale(recorded, stage, warm) == "finetune.losses.squarehead.temperature: 1.0 -> 2.0"


def test_finished_work_is_replaced_only_where_that_is_asked_for(tmp_path, capsys):
    _finish(_config(tmp_path))
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    command = ["run", str(RECIPE), f"folder='{tmp_path}'", "prune.sparsity=0.5", "--stages", "prune,finetune"]
    assert main(command) == 2
    told = capsys.readouterr().err
    assert "prune (prune.sparsity: 0.75 -> 0.5), finetune/ce (prune will be new)" in told and "--replace" in told
    assert told.count("\n") == 1 and "evaluate" not in told
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before
    assert main([*command, "--dry-run"]) == 0
    assert "prune.sparsity: 0.75 -> 0.5" in capsys.readouterr().out
    runner.check_replaced([_config(tmp_path, "prune.sparsity=0.5")], [], replace=True)
    runner.check_replaced([_config(tmp_path)], [], replace=False)
    assert main(["run", str(RECIPE), f"folder='{tmp_path}'", "sweep={seed: [1, 2]}", "name=sweep", "--dry-run"]) == 0


def test_what_the_run_did_not_make_is_never_replaced(tmp_path):
    config = _config(tmp_path)
    config.path.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").touch()
    (config.path / "dense").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"dense is a link to .*elsewhere, which this run did not make"):
        runner.check_replaced([config], [], replace=True)
    (config.path / "dense").unlink()
    (config.path / "prune.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"prune\.partial is a link"):
        runner.check_replaced([config], [], replace=True)
    (config.path / "prune.partial").unlink()
    (config.path / "dense").mkdir()
    (config.path / "dense" / "mine").touch()
    with pytest.raises(UserError, match="dense was not made by stage dense of a run"):
        runner.check_replaced([config], [], replace=True)
    (tmp_path / "new.partial").mkdir()
    with pytest.raises(UserError, match="was not made by stage dense"):
        artifacts.publish(tmp_path / "new.partial", config.path / "dense", {"stage": "dense"})
    assert (config.path / "dense" / "mine").exists()


@pytest.mark.parametrize("name", [".", "..", "-x", ".git", "a/b", ""])
def test_a_run_has_a_name_of_its_own(name, tmp_path, capsys):
    assert main(["run", str(RECIPE), f"folder='{tmp_path}'", f"name='{name}'", "--dry-run"]) == 2
    assert "name" in capsys.readouterr().err


def test_a_run_does_not_move_into_a_folder_of_others(tmp_path):
    (tmp_path / "tiny").mkdir()
    with runner.locked(tmp_path / "tiny"):  # an empty one is as good as new
        pass
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "theirs.py").touch()
    with pytest.raises(UserError, match="holds files and is not a run folder"), runner.locked(tmp_path / "code"):
        pass
    assert [path.name for path in (tmp_path / "code").iterdir()] == ["theirs.py"]


def _reads_of_jobs(folder):
    """Job -> (section's class, key) of every key that it read while it ran, for the whole pipeline on one rank."""
    logging.disable(logging.WARNING)
    config, read, plain = _config(folder), {}, Section.__getattribute__
    known = {id(_owner(config, key)) for key, _ in _leaves(config)}
    at_work = None

    def recording(section, name):
        # Others are made by the jobs themselves; a level of a chain is a copy.
        ours = id(section) in known or type(section) is PruneConfig
        if at_work is not None and ours and name in type(section).model_fields:
            read.setdefault(at_work, set()).add((type(section).__name__, name))
        return plain(section, name)

    for stage in build_stages(config):
        out = config.path / f"{stage.id}.partial"
        out.mkdir(parents=True)
        job = Job(config, out, input_paths(stage, config), lambda *_: None, stage.id, stage.level)
        module = importlib.import_module(f"sparse_train.jobs.{stage.job}")
        Section.__getattribute__, at_work = recording, stage.job
        try:
            metrics = module.run(job)
        finally:
            Section.__getattribute__, at_work = plain, None
        artifacts.publish(out, config.path / stage.id, {
            "stage": stage.id, "sources": sources(stage, config), "seconds": 1.0, "metrics": metrics})
    return read


@pytest.mark.slow
def test_a_job_reads_no_key_that_is_not_among_its_sources(tmp_path):
    (read,) = run_ranks(_reads_of_jobs, 1, tmp_path)
    config = _config(tmp_path)
    classes = {key: type(_owner(config, key)).__name__ for key, _ in _leaves(config)}
    # Paths of files, how work is divided and watched: no result depends on them.
    free = {key for key in classes if fnmatch(key, "folder") or any(
        jobs == "" and fnmatch(key, pattern) for pattern, jobs in READERS.items())} | {"dense.path", "model.path"}
    for stage in build_stages(config):
        own = {(classes[key], key.rpartition(".")[2]) for key in classes
               if any(key == part or key.startswith(f"{part}.") for part in stage.reads) or key in free}
        sections = {("RunConfig", name) for name in RunConfig.model_fields}  # what is read of them counts
        leaves = {(classes[key], key.rpartition(".")[2]) for key in classes}
        missing = (read[stage.job] - own - sections) & leaves
        assert not missing, (stage.id, missing)


def _owner(config, key):
    found = config
    for part in key.split(".")[:-1]:
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    return found
