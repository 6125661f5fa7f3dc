"""When a finished stage is current, why it is not, and what may take its place."""

import itertools
import os
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from sparse_train import artifacts
from sparse_train.config import RunConfig, Section, TaskConfig
from sparse_train.config.load import load_config
from sparse_train.config.task import MixConfig
from sparse_train.errors import UserError
from sparse_train.jobs.job import finished_file
from sparse_train.launch.cli import main
from sparse_train.launch.run.cluster import ClusterConfig
from sparse_train.launch.run.folder import freeze, partial_folder, read_run
from sparse_train.launch.run.lock import locked
from sparse_train.launch.run.plan import check_replaced, claim, plan
from sparse_train.launch.run.sources import sources, why_stale
from sparse_train.launch.run.stages import build_stages, find_stage
from sparse_train.launch.worker.staging import check_inputs, prepare_folder

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
    "task.test_split": "evaluate compress benchmark",
    "task.max_bad_share": "",
    "task.pack": "dense finetune", "task.mix": "dense finetune",
    "task.*": "dense prune finetune evaluate compress benchmark",
    "model.*": "dense",
    "*.zero.*": "", "*.sequence_parallel": "", "*.activation_checkpointing": "", "*.checkpoint*": "", "*.log_every": "",
    "dense.path": "",  # another graph, whose stages have another input
    "dense.*": "dense",
    "prune.sparsity": "prune benchmark report",
    **dict.fromkeys(("prune.num_calibration", "prune.calibration", "prune.batch_size", "prune.damping"),
                    "prune compress report"),  # compress.rounding=compensated
    "prune.allocation_spread": "report", "prune.outlier_factor": "report",
    "prune.*": "prune report",
    "finetune.teacher.precision": "finetune",
    "finetune.teacher.*": "",
    "finetune.steps": "finetune report",
    "finetune.num_examples": "finetune report",
    "finetune.*": "finetune",
    "evaluate.precision": "evaluate", "evaluate.placement": "",
    "evaluate.*texts": "evaluate",
    "evaluate.*": "evaluate compress",
    "compress.precisions": "compress benchmark",
    "compress.int8_head": "compress",
    "compress.rounding": "compress",
    "compress.loss": "compress benchmark report",  # takes another input
    "benchmark.*": "benchmark",
    "folder": "", "tracking.*": "", "sweep": "",
}


def _config(folder, *overrides):
    return load_config(RunConfig, RECIPE, [f"folder='{folder}'", *overrides])


def _begin(config):
    with locked(config.path):
        freeze(config, ClusterConfig())


def _finish(config):
    """Each stage as a signed folder with a file in it."""
    _begin(config)
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
    numbers = TaskConfig(name="numbers")
    special = {"prune.sparsity": 0.5, "prune.method": "magnitude", "prune.calibration": numbers,
               "prune.reconstruction.steps": 5,
               "task.mix": MixConfig(share=0.5, task=numbers), "evaluate.texts": {"books": TaskConfig(name="text")},
               "task.name": "gsm8k", "benchmark.devices": ("gpu",), "compress.loss": "ce",
               "folder": str(tmp_path / "moved")}
    if key.endswith(".terms"):
        return {"logit": 0.5}
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
        found = {stage.kind for stage in build_stages(changed)
                 if why_stale(artifacts.read_manifest(config.path / stage.id)["sources"], stage, changed)}
        expected = next(jobs for pattern, jobs in READERS.items() if fnmatch(key, pattern))
        if found != set(expected.split()):
            wrong[key] = f"{sorted(found)}, not {expected}"
    assert not wrong


def test_compressing_reads_calibration_data_only_where_it_rounds_by_them(tmp_path):
    for rounding, count in (("nearest", 0), ("compensated", 4)):
        stage = find_stage(_config(tmp_path, f"compress.rounding={rounding}"), "compress")
        assert sum(key.startswith("prune.") for key in stage.reads) == count


def test_keys_of_a_newer_release_make_nothing_stale_unless_they_are_set(tmp_path):
    config = _config(tmp_path)
    _finish(config)
    stage = find_stage(config, "finetune/squarehead")
    recorded = artifacts.read_manifest(config.path / stage.id)["sources"]
    del recorded["config"]["finetune.clip"], recorded["config"]["finetune.losses.squarehead"]["temperature"]
    assert why_stale(recorded, stage, config) is None
    # An older name of a key: the value counts.
    del recorded["config"]["finetune.losses.squarehead"]["features"]
    recorded["config"]["finetune.losses.squarehead"]["final_feature"] = "norm"
    assert why_stale(recorded, stage, config) == 'finetune.losses.squarehead.features: "final_norm" -> "blocks"'
    recorded["config"]["finetune.losses.squarehead"]["final_feature"] = "block"
    assert why_stale(recorded, stage, config) is None
    assert why_stale(recorded, stage, _with(config, "finetune.clip", 2.0)) == "finetune.clip: 1.0 -> 2.0"
    # A key that the older release knew, and did not count, had the value that the whole config tells.
    del recorded["config"]["finetune.teacher.precision"]
    assert why_stale(recorded, stage, config, {"finetune": {"teacher": {"precision": "bf16"}}}) == \
        'finetune.teacher.precision: "bf16" -> null'
    assert why_stale(recorded, stage, config, {"finetune": {}}) is None
    other = {**recorded, "inputs": {name: "another" for name in reversed(recorded["inputs"])}}
    assert list(other["inputs"]) == ["prune", "dense"] and why_stale(other, stage, config) == "dense has changed"
    warm = _with(config, "finetune.losses.squarehead.temperature", 2.0)
    assert why_stale(recorded, stage, warm) == "finetune.losses.squarehead.temperature: 1.0 -> 2.0"


def test_finished_work_is_replaced_only_where_that_is_asked_for(tmp_path, capsys):
    _finish(_config(tmp_path))
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    command = ["run", str(RECIPE), f"folder='{tmp_path}'", "prune.sparsity=0.5", "--stages", "prune,finetune"]
    assert main(command) == 2
    told = capsys.readouterr().err
    assert "prune (prune.sparsity: 0.75 -> 0.5), finetune/ce (prune changes)" in told and "--replace" in told
    assert told.count("\n") == 1 and "evaluate" not in told
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before
    assert main([*command, "--dry-run"]) == 0
    assert "prune.sparsity: 0.75 -> 0.5" in capsys.readouterr().out
    check_replaced([_config(tmp_path, "prune.sparsity=0.5")], [], replace=True)
    check_replaced([_config(tmp_path)], [], replace=False)
    check_replaced([_config(tmp_path, "about=words")], [], replace=False)  # the report alone
    assert main(["run", str(RECIPE), f"folder='{tmp_path}'", "sweep={seed: [1, 2]}", "name=sweep", "--dry-run"]) == 0


def test_what_the_run_did_not_make_is_never_replaced(tmp_path):
    config = _config(tmp_path)
    _begin(config)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").touch()
    (config.path / "dense").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"dense is a link to .*elsewhere, which this run did not make"):
        check_replaced([config], [], replace=True)
    (config.path / "dense").unlink()
    (config.path / "prune.partial").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"prune\.partial is a link"):
        check_replaced([config], [], replace=True)
    (config.path / "prune.partial").unlink()
    (config.path / "dense").mkdir()
    (config.path / "dense" / "mine").touch()
    with pytest.raises(UserError, match="dense was not made by stage dense of a run"):
        check_replaced([config], [], replace=True)
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
    with locked(tmp_path / "tiny"):  # an empty one is as good as new
        pass
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "theirs.py").touch()
    with pytest.raises(UserError, match="holds files and is not a run folder"), locked(tmp_path / "code"):
        pass
    assert [path.name for path in (tmp_path / "code").iterdir()] == ["theirs.py"]


def _refused(config, match):
    with pytest.raises(UserError, match=match):
        check_replaced([config], [], replace=True)


def test_what_stands_where_a_stage_works_is_not_cleared_unless_it_is_its_own(tmp_path):
    config = _config(tmp_path)
    _begin(config)
    theirs = config.path / "dense.partial" / "thesis.txt"
    theirs.parent.mkdir()
    theirs.touch()
    _refused(config, r"dense\.partial was not made by stage dense")
    with pytest.raises(UserError, match=r"dense\.partial was not made by stage dense"):
        check_inputs(find_stage(config, "dense"), config)
    assert theirs.is_file()


def test_a_saved_state_is_earlier_work_too(tmp_path):
    config = _config(tmp_path)
    dense = find_stage(config, "dense")
    _begin(config)
    prepare_folder(dense, config)
    step = partial_folder(dense, config) / "checkpoints" / "step-00000020"
    step.mkdir(parents=True)
    (step / artifacts.DONE).touch()
    placed = _config(tmp_path, "dense.zero.offload_optimizer=true", "dense.checkpoint_every=5")
    check_replaced([placed], [], False)
    with pytest.raises(UserError, match=r"dense, unfinished at step-00000020 \(dense.steps: 6 -> 9\)"):
        check_replaced([_config(tmp_path, "dense.steps=9")], [], False)
    check_replaced([_config(tmp_path, "dense.steps=9")], [], True)
    prepare_folder(dense, config)
    assert (step / artifacts.DONE).is_file()
    evaluate = find_stage(config, "evaluate")
    prepare_folder(evaluate, config)
    finished = finished_file(partial_folder(evaluate, config))
    finished.parent.mkdir()
    finished.touch()
    other = [_config(tmp_path, "evaluate.num_examples=9")]
    check_replaced(other, [], False)
    finished.write_text('["dense", 0, []]\n' * 7)
    with pytest.raises(UserError, match="evaluate, unfinished at 7 batches"):
        check_replaced(other, [], False)


def test_clearing_a_state_of_other_settings_may_be_cut_off(tmp_path, monkeypatch):
    config, other = _config(tmp_path), _config(tmp_path, "dense.steps=9")
    dense, partial = find_stage(config, "dense"), config.path / "dense.partial"
    prepare_folder(dense, config)
    (partial / "checkpoints").mkdir()
    (partial / "checkpoints" / "kept").touch()

    def cut(folder, **_):
        for file in filter(Path.is_file, Path(folder).iterdir()):
            file.unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", cut)
        prepare_folder(dense, other)
    artifacts.require_own(partial, "dense")
    (partial / "linked").symlink_to(tmp_path)
    prepare_folder(dense, other)
    assert [path.name for path in partial.iterdir()] == [artifacts.SOURCES] and tmp_path.is_dir()


def test_a_run_of_a_release_without_compress_loss_can_still_be_read(tmp_path):
    config = _config(tmp_path)
    _begin(config)
    older = yaml.safe_load((config.path / "config.yaml").read_text())
    del older["compress"]["loss"]
    (config.path / "config.yaml").write_text(yaml.safe_dump(older, sort_keys=False))
    assert read_run(config.path).compressed_loss == list(config.finetune.losses)[-1]


def test_a_stage_is_not_written_into_another_ones_result(tmp_path):
    """A list of sparsities gives stages below prune/, where a single one had its result."""
    _finish(_config(tmp_path))
    with pytest.raises(UserError, match="tiny/prune is a finished stage, and prune/50/one-shot would be written into"):
        check_replaced([_config(tmp_path, "prune.sparsity=[0.5,0.75]")], [], replace=True)


@pytest.mark.parametrize("killed_at", [0, 1, 2])
def test_a_replacement_that_is_cut_off_leaves_one_whole_result(killed_at, tmp_path, monkeypatch):
    """Killed before the old one is moved, before the new one is, before the old one goes."""
    config, other = _config(tmp_path), _config(tmp_path, "prune.sparsity=0.5")
    _finish(config)
    prune, final, rename = find_stage(other, "prune"), config.path / "prune", os.rename
    renames = itertools.count()

    def publish():
        prepare_folder(prune, other)
        (partial_folder(prune, other) / "result").write_text("new")
        artifacts.publish(partial_folder(prune, other), final, {"stage": "prune", "sources": sources(prune, other)})

    def stop(source, target):
        if next(renames) == killed_at:
            raise KeyboardInterrupt
        rename(source, target)

    def remove(folder):
        if killed_at == 2 and folder.exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "rename", stop)
        patch.setattr(artifacts, "_remove", remove)
        publish()
    before = {planned.stage.id: planned.reason for planned in plan(config, ["prune"])}
    assert before == {"prune": "current" if killed_at < 2 else "prune.sparsity: 0.5 -> 0.75"}
    with pytest.raises(UserError, match="--replace"):
        check_replaced([other], [], False)
    claim(other, ClusterConfig(), [], True)
    assert artifacts.damage(final) is None
    assert (final / "result").read_text() == ("prune" if killed_at < 2 else "new")
    publish()
    assert (final / "result").read_text() == "new" and not list(config.path.glob(".*.replaced"))


def test_what_cannot_be_written_is_one_line_before_anything_starts(tmp_path, monkeypatch, capsys):
    (tmp_path / "tiny").touch()
    assert main(["run", str(RECIPE), f"folder='{tmp_path}'"]) == 2
    assert "tiny is not a folder, so no run can be in it" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda *_: False)  # as on a file system that is read-only
    assert main(["run", str(RECIPE), f"folder='{tmp_path}/new'", "--dry-run"]) == 2
    err = capsys.readouterr().err
    assert "cannot be written (its permissions, or a read-only file system)" in err and err.count("\n") == 1
