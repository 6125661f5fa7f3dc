"""Signed folders, the metrics file, and wandb as a guest that may fail."""

import json
import sys
import types

import pytest

from sparse_train import artifacts
from sparse_train.config import WandbConfig
from sparse_train.errors import UserError
from sparse_train.tracking import Progress, Tracker


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


def test_a_broken_json_file_is_a_clear_line(tmp_path):
    (tmp_path / "m.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*m\.json"):
        artifacts.read_json(tmp_path / "m.json")


def test_rewinding_drops_later_steps_and_half_lines(tmp_path):
    tracker = Tracker(tmp_path, "id")
    for step in (1, 2, 3):
        tracker.log(step, {"loss": 1.0})
    tracker.close()
    with open(tracker.path, "a") as file:
        file.write('{"step": 4, "lo')
    again = Tracker(tmp_path, "id")
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

    run = types.SimpleNamespace(log=call("log"), finish=call("finish"))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=call("init")))
    return calls


@pytest.mark.parametrize("fail_at", ["init", "log", "finish"])
def test_a_failing_wandb_is_left_out_and_metrics_go_on(fail_at, tmp_path, monkeypatch):
    calls = _fake_wandb(monkeypatch, fail_at)
    tracker = Tracker(tmp_path, "id", {}, WandbConfig())
    tracker.log(1, {"loss": 1.0})
    tracker.log(2, {"loss": 0.5})
    tracker.close()
    assert len(tracker.path.read_text().splitlines()) == 2
    assert sum(name == fail_at for name, *_ in calls) == 1


def test_wandb_sees_nested_metrics_flat(tmp_path, monkeypatch):
    calls = _fake_wandb(monkeypatch, None)
    tracker = Tracker(tmp_path, "fixed", {"a": 1}, WandbConfig(mode="offline"))
    tracker.log(7, {"loss": 1.0, "squarehead": {"0": 0.25}})
    assert calls[0][2]["name"] == "fixed" and calls[0][2]["mode"] == "offline"
    assert calls[1][1:] == (({"loss": 1.0, "squarehead/0": 0.25},), {"step": 7})
    Tracker(tmp_path, "fixed", {}, WandbConfig())
    assert calls[2][2]["id"] == calls[0][2]["id"] and calls[2][2]["resume"] == "allow"


def test_wandb_itself_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracker = Tracker(tmp_path, "fixed", {}, WandbConfig(mode="offline"))
    tracker.log(1, {"loss": 1.0})
    tracker.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


def test_progress_is_written_at_the_end_and_not_at_every_call(tmp_path):
    progress = Progress(tmp_path / "p.json", seconds_between=60)
    for done in range(1, 11):
        progress(done, 10, "x")
        if done == 5:
            assert artifacts.read_json(tmp_path / "p.json")["done"] == 1
    assert artifacts.read_json(tmp_path / "p.json") == {"done": 10, "total": 10, "note": "x"}
