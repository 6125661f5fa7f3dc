"""Signed folders, the metrics file, and wandb as a guest that may fail."""

import json
import logging
import sys
import types

import pytest

from sparse_train import artifacts
from sparse_train.config import WandbConfig
from sparse_train.errors import UserError
from sparse_train.tracking import Progress, Tracker, log_results


def _signed(tmp_path):
    partial = tmp_path / "a.partial"
    (partial / "deep").mkdir(parents=True)
    (partial / "deep" / "x").write_text("one")
    (partial / "y").write_text("two")
    artifacts.publish(partial, tmp_path / "a", {"key": "k"})
    return tmp_path / "a"


def test_a_published_folder_is_whole_and_its_manifest_names_every_file(tmp_path):
    folder = _signed(tmp_path)
    assert not (tmp_path / "a.partial").exists()
    assert sorted(artifacts.read_manifest(folder)["files"]) == ["deep/x", "y"]
    assert artifacts.damage(folder) is None


@pytest.mark.parametrize("spoil, told", [
    (lambda folder: (folder / "y").unlink(), "y is missing"),
    (lambda folder: (folder / "y").write_text("tvo"), "y is not the file that was signed"),
    (lambda folder: (folder / "DONE").unlink(), "is not signed"),
])
def test_damage_is_found_and_named(spoil, told, tmp_path):
    folder = _signed(tmp_path)
    spoil(folder)
    assert told in artifacts.damage(folder)


def test_publishing_again_replaces_the_whole_folder(tmp_path):
    _signed(tmp_path)
    (tmp_path / "b.partial").mkdir()
    artifacts.publish(tmp_path / "b.partial", tmp_path / "a", {})
    assert artifacts.read_manifest(tmp_path / "a")["files"] == {}


def test_who_is_killed_while_publishing_can_go_on(tmp_path, monkeypatch):
    partial = tmp_path / "a.partial"
    (partial / "checkpoints").mkdir(parents=True)
    for name in ("key", "checkpoints/step", "model"):
        (partial / name).touch()

    def killed(*_):
        raise KeyboardInterrupt

    for what in ("digest_file", "write_json", "os.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(f"sparse_train.artifacts.{what}", killed)
            with pytest.raises(KeyboardInterrupt):
                artifacts.publish(partial, tmp_path / "a", {}, ("key", "checkpoints"))
        assert (partial / "key").is_file() and (partial / "checkpoints" / "step").is_file()
    artifacts.publish(partial, tmp_path / "a", {}, ("key", "checkpoints"))
    assert artifacts.damage(tmp_path / "a") is None
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["DONE", "manifest.json", "model"]


@pytest.mark.parametrize("text", [b"{", b"[" * 100_000, b"9" * 5000, b"\xff"], ids=["cut", "deep", "long", "not UTF-8"])
def test_a_broken_json_file_is_a_clear_line(text, tmp_path):
    (tmp_path / "m.json").write_bytes(text)
    with pytest.raises(UserError, match=r"cannot read .*m\.json"):
        artifacts.read_json(tmp_path / "m.json")


def test_rewinding_drops_later_steps_and_half_lines(tmp_path):
    tracker = Tracker(tmp_path, tmp_path, "dense", "dense")
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 1.0})
    tracker.close()
    with open(tracker.path, "a") as file:
        file.write('{"step": 4, "lo')
    again = Tracker(tmp_path, tmp_path, "dense", "dense")
    again.rewind(2)
    again.log(3, {"loss": 0.5})
    again.close()
    assert [json.loads(line)["step"] for line in again.path.read_text().splitlines()] == [1, 2, 3]


def _fake_wandb(monkeypatch, fail_at):
    calls = []

    def call(name):
        def done(*args, **kwargs):
            calls.append((name, args, kwargs))
            if name == fail_at:
                raise ConnectionError("no network")
            return run
        return done

    run = types.SimpleNamespace(log=call("log"), finish=call("finish"), define_metric=call("define_metric"))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(
        init=call("init"), Table=lambda columns, rows: (columns, rows), Image=lambda path: path))
    return calls


def _told(calls, name):
    return [args[0] for called, args, _ in calls if called == name]


@pytest.mark.parametrize("fail_at", ["init", "define_metric", "log", "finish"])
def test_a_failing_wandb_is_left_out_and_metrics_go_on(fail_at, tmp_path, monkeypatch):
    calls = _fake_wandb(monkeypatch, fail_at)
    tracker = Tracker(tmp_path, tmp_path, "dense", "dense", {}, WandbConfig())
    tracker.log(1, {"loss": 1.0})
    tracker.log(2, {"loss": 0.5})
    tracker.close()
    assert len(tracker.path.read_text().splitlines()) == 2
    assert sum(name == fail_at for name, *_ in calls) == 1


def test_where_wandb_is_not_installed_a_rank_warns_once_and_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = Tracker(tmp_path, tmp_path, "dense", "dense", {}, WandbConfig())
    tracker.log(1, {"loss": 1.0})
    tracker.close()
    assert len(tracker.path.read_text().splitlines()) == 1
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "pip install 'sparse-train[wandb]'" in warning


def test_wandb_gets_one_run_per_stage_with_a_step_of_our_own(tmp_path, monkeypatch):
    calls, run = _fake_wandb(monkeypatch, None), tmp_path / "demo"
    tracker = Tracker(tmp_path, run, "finetune/ce", "finetune", {"a": 1}, WandbConfig(mode="offline"))
    tracker.log(7, {"loss": 1.0, "squarehead": {"0": 0.25}, "nodes": {"0": {"memory_gb": 2.0}}})
    given = calls[0][2]
    assert (given["name"], given["group"], given["job_type"], given["mode"], given["dir"]) == \
        ("demo/finetune/ce", "demo", "finetune", "offline", str(run))
    assert calls[1][1:] == (("*",), {"step_metric": "global_step"})
    assert calls[2][1:] == (({"global_step": 7, "loss": 1.0, "squarehead/0": 0.25, "nodes/0/memory_gb": 2.0},), {})
    Tracker(tmp_path, run, "finetune/ce", "finetune", {}, WandbConfig())
    again = [kwargs for name, _, kwargs in calls if name == "init"][1]
    assert again["id"] == given["id"] and again["resume"] == "allow"


def test_wandb_gets_tables_and_pictures_of_a_finished_stage(tmp_path, monkeypatch):
    calls, stage = _fake_wandb(monkeypatch, None), tmp_path / "demo" / "benchmark"
    stage.mkdir(parents=True)
    (tmp_path / "demo" / "logs" / "benchmark").mkdir(parents=True)
    artifacts.write_json(stage / "rows.json", {"machine": {}, "rows": [{"a": 1}, {"a": 2, "b": {"c": 3}}]})
    artifacts.write_json(stage / "other.json", {"no": "rows"})
    (stage / "plot.png").touch()
    log_results(tmp_path / "demo", "benchmark", "benchmark", {"bandwidth": 3.0, "names": ["x"]}, WandbConfig())
    assert _told(calls, "log") == [{"bandwidth": 3.0}, {"rows": (["a", "b/c"], [[1, None], [2, 3]])},
                                   {"plot": str(stage / "plot.png")}]
    assert calls[-1][0] == "finish"


def test_wandb_itself_offline_and_where_the_key_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_API_KEY", key := "k" * 40)
    for step in (1, 2):  # two attempts
        tracker = Tracker(tmp_path, tmp_path, "dense", "dense", {}, WandbConfig(mode="offline"))
        tracker.log(step, {"loss": 1.0})
        tracker.close()
    folders = list(tmp_path.glob("wandb/offline-run-*"))
    # Of two in one second wandb names the later one ID-1.
    assert folders and all((tmp_path / "wandb-id").read_text() in folder.name for folder in folders)
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == len(folders)
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and key.encode() in file.read_bytes()]


def test_progress_is_written_at_the_end_and_not_at_every_call(tmp_path, caplog):
    caplog.set_level(logging.INFO, "sparse_train")
    progress = Progress(tmp_path / "p.json", seconds_between=60)
    for done in range(1, 11):
        progress(done, 10, "x")
        if done == 5:
            assert artifacts.read_json(tmp_path / "p.json")["done"] == 1
    written = artifacts.read_json(tmp_path / "p.json")
    assert (written["done"], written["total"], written["note"], written["seconds_left"]) == (10, 10, "x", 0)
    assert caplog.messages == ["1/10 x", "10/10 x"]


def test_progress_stops_one_who_should_not_write(tmp_path):
    def guard():
        raise RuntimeError("another is at work")

    with pytest.raises(RuntimeError, match="another"):
        Progress(tmp_path / "p.json", guard)(1, 10)
    assert not (tmp_path / "p.json").exists()
