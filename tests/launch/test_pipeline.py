"""The command line from nothing to a report on two ranks, then what users do next: rerun, look, break, stop."""

import fnmatch
import functools
import itertools
import json
import operator
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from sparse_train import artifacts
from sparse_train.config import RunConfig
from sparse_train.config.load import load_config
from sparse_train.launch.run.stages import build_stages
from sparse_train.sparse import TensorFolder

RECIPE = Path(__file__).with_name("tiny.yaml")
_TEXTS = (f"evaluate.texts.prose.path='{Path(__file__).parents[2] / 'LICENSE'}'", "evaluate.texts.prose.max_length=64",
          "evaluate.texts.prose.test_share=0.5", "evaluate.num_texts=3", "about=nothing learnt")
STAGES = ["dense", "prune", "finetune/ce", "finetune/squarehead", "evaluate", "compress", "benchmark", "report"]


def _command(*arguments):
    return [sys.executable, "-P", "-m", "sparse_train.launch.cli", *map(str, arguments)]


def _cli(*arguments, code=0, **options):
    """(stdout, stderr) of the command line in a process of its own."""
    done = subprocess.run(_command(*arguments), capture_output=True, text=True, timeout=280, stdin=subprocess.DEVNULL,
                          **options)
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(runs folder, what the command printed) of one complete run; the path has a space, as users' paths do."""
    folder, recorder = tmp_path_factory.mktemp("all runs"), Path(__file__).with_name("recorder")
    (folder / "reads").mkdir()
    env = {**os.environ, "PYTHONPATH": str(recorder), "READS": str(folder / "reads")}
    return folder, _cli("run", RECIPE, f"folder='{folder}'", *_TEXTS, env=env)[0]


def test_every_stage_is_signed_and_undamaged(run):
    for stage in STAGES:
        folder = run[0] / "tiny" / stage
        assert artifacts.damage(folder) is None
        assert artifacts.read_manifest(folder)["stage"] == stage
    assert not list((run[0] / "tiny").rglob("*.partial"))
    assert artifacts.read_manifest(run[0] / "tiny" / "dense")["num_ranks"] == 2


# What jobs read and no result depends on: places, how work is divided, what is saved, logged and refused.
_NO_SOURCE = {"folder", "name", "tracking.wandb", "*.activation_checkpointing", "*.sequence_parallel", "*.zero.*",
              "*.checkpoint_every", "*.checkpoints_kept", "*.log_every", "finetune.teacher.offload",
              "finetune.teacher.persistence_threshold", "evaluate.placement"}
# What this run has no use for and others have: other tasks' data, and sizes, settings and terms that are not given;
# and which devices are measured, of which each stage has one.
_ELSEWHERE = {"task.path", "task.subset", "task.*_split", "task.test_share", "task.language*", "task.max_length",
              "task.shots", "task.system", "model.d_ff", "model.n_kv_heads", "model.window_seconds",
              "finetune.losses.*", "prune.sparsity", "prune.reconstruction.learning_rate", "benchmark.devices",
              "evaluate.texts.*"}


def test_the_sources_of_each_stage_are_what_its_job_read(run):
    config = load_config(RunConfig, RECIPE, _TEXTS)
    missing, idle = {}, {}
    for stage in build_stages(config):
        read = set((run[0] / "reads" / stage.id.replace("/", "-")).read_text().split())
        tree = config.model_dump(mode="json")
        sourced = {key for part in stage.reads
                   for key in _leaves(functools.reduce(operator.getitem, part.split("."), tree), part)}
        missing |= dict.fromkeys(read - sourced, stage.id)
        idle |= dict.fromkeys(sourced - read, stage.id)
    for found, known in ((missing, _NO_SOURCE), (idle, _ELSEWHERE)):
        told = {pattern: fnmatch.filter(found, pattern) for pattern in known}
        assert set(found) == set(itertools.chain(*told.values())), found
        assert all(told.values()), told  # nothing is excused that need not be


def _leaves(value, key):
    if not isinstance(value, dict):
        return [key]
    return [leaf for name in value for leaf in _leaves(value[name], f"{key}.{name}")]


def test_the_metrics_have_every_term_of_every_step(run):
    lines = [json.loads(line) for line in (run[0] / "tiny/finetune/squarehead/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 7))
    for line in lines:
        assert set(line["squarehead"]) == {"0", "1"}
        assert line["loss"] == pytest.approx(line["task"] + sum(line["squarehead"].values()), rel=1e-5)
        assert line["learning_rate"] > 0 and line["tokens_per_second"] > 0 and line["gradient_norm"] > 0


def test_the_report_has_every_row_and_opens_offline(run):
    report = run[0] / "tiny" / "report"
    data = artifacts.read_json(report / "report.json")
    assert {row["loss"] for row in data["scores"]} == {"dense", "one-shot", "ce", "squarehead"}
    assert all(set(row) >= {"model", "loss", "sparsity", "metric", "value"} for row in data["scores"])
    assert {row["sparsity"] for row in data["scores"] if row["loss"] != "dense"} == {0.75}
    assert {(row["engine"], row["precision"]) for row in data["speed"]} == \
        {("torch", "fp32"), *(("sparse", precision) for precision in ("fp32", "bf16", "int8", "int4"))}
    assert all(row["milliseconds"] > 0 and row["fraction_of_byte_bound"] > 0 for row in data["speed"])
    on_texts = {metric: [row["value"] for row in data["scores"] if row["metric"] == f"prose/{metric}"]
                for metric in ("perplexity", "kl", "num_tokens")}
    assert [len(values) for values in on_texts.values()] == [4, 4, 4] and len(set(on_texts["num_tokens"])) == 1
    assert all(value > 1 for value in on_texts["perplexity"])
    assert on_texts["kl"][0] == 0 and all(value > 0 for value in on_texts["kl"][1:])
    assert (report / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    page = (report / "report.html").read_text()
    assert "nothing learnt" in page and "nothing learnt" in run[1]
    assert "squarehead" in page and "data:image/png;base64," in page and "http" not in page
    for shown in (page, " ".join(run[1].split())):
        assert "tokens of general text; kl: KL(dense || model) in nats per token" in shown.replace("&gt;", ">")
    assert "squarehead" in run[1] and f"report: {report / 'report.html'}" in run[1]


def test_zeros_are_the_same_from_pruning_to_the_dense_export(run):
    folder = run[0] / "tiny"
    pruned = TensorFolder(folder / "prune")
    theirs = AutoModelForCausalLM.from_pretrained(folder / "compress" / "dense").state_dict()
    for name in pruned.shapes:
        keep = pruned.weight(name).keep
        for made in ("finetune/ce", "finetune/squarehead", "compress/sparse-int8"):
            assert torch.equal(TensorFolder(folder / made).weight(name).keep, keep), (made, name)
        assert not theirs[f"{name}.weight"][~keep].any()


def test_every_file_of_a_run_has_the_mode_that_the_umask_gives(run):
    (mine := run[0] / "mine").touch()
    assert {path for path in (run[0] / "tiny").rglob("*")
            if path.is_file() and path.stat().st_mode != mine.stat().st_mode} == set()


def test_a_rerun_does_nothing_and_a_change_redoes_what_depends_on_it(run):
    planned = _cli("run", RECIPE, f"folder='{run[0]}'", *_TEXTS, "--dry-run")[0].splitlines()[-len(STAGES):]
    assert [line.split() for line in planned] == [[stage, "current"] for stage in STAGES]
    again, _ = _cli("run", RECIPE, f"folder='{run[0]}'", *_TEXTS)
    assert [line.split() for line in again.splitlines()[:len(STAGES)]] == [[stage, "current"] for stage in STAGES]
    plan, _ = _cli("run", RECIPE, f"folder='{run[0]}'", *_TEXTS, "finetune.losses.squarehead.feature_weight=2.0",
                   "--dry-run")
    state = {line.split()[0]: line.split(maxsplit=1)[1].strip() for line in plan.splitlines()}
    assert [stage for stage in STAGES if state[stage] == "current"] == ["dense", "prune", "finetune/ce"]
    assert state["finetune/squarehead"] == "finetune.losses.squarehead.feature_weight: 1.0 -> 2.0"
    assert state["evaluate"] == "finetune/squarehead changes"


def test_looking_at_a_run_and_its_models(run, monkeypatch):
    folder = run[0] / "tiny"
    monkeypatch.chdir(folder)
    shown, _ = _cli("status", ".")
    assert [line.split()[:2] for line in shown.splitlines()[1:]] == [[stage, "done"] for stage in STAGES]
    shown, _ = _cli("inspect", folder / "compress" / "sparse-int8")
    row = next(line.split() for line in shown.splitlines() if "blocks.0.ffn.up_proj" in line)
    assert row[1:4] == ["128x32", "I8", "0.7500"]
    assert row[4] == f"{128 * 32 // 4 + 128 * 8 + 128 * 4:,}"
    shown, _ = _cli("inspect", folder / "compress" / "dense")
    assert next(line.split()[3] for line in shown.splitlines() if "blocks.0.ffn.up_proj" in line) == "0.7500"
    answers = {_cli("generate", folder / "compress" / name, "--prompt", "Question: Tom", "--max-new-tokens", "4")[0]
               for name in ("dense", "sparse-fp32")}
    assert len(answers) == 1


@pytest.mark.slow  # test_sweep.py has all of it but a report
def test_a_dense_model_from_outside_is_the_teacher_and_nothing_dense_is_trained(run, tmp_path):
    shutil.copytree(run[0] / "tiny" / "dense", tmp_path / "my model")
    _cli("run", RECIPE, f"folder={tmp_path}", f"dense.path='{tmp_path / 'my model'}'",
         "prune.pattern=2:4", "prune.sparsity=null", "prune.method=magnitude", "finetune.zero.stage=2",
         "compress.precisions=[int8]", "finetune.losses={squarehead: {feature_weight: 1}}")
    assert not (tmp_path / "tiny" / "dense").exists()
    data = artifacts.read_json(tmp_path / "tiny" / "report" / "report.json")
    assert {(row["loss"], row["sparsity"]) for row in data["scores"]} == \
        {("dense", 0.0), ("one-shot", 0.5), ("squarehead", 0.5)}


def test_a_damaged_input_is_refused_by_name(run, tmp_path):
    shutil.copytree(run[0] / "tiny" / "dense", tmp_path / "tiny" / "dense")
    for name in ("config.yaml", "cluster.yaml"):
        shutil.copy(run[0] / "tiny" / name, tmp_path / "tiny")
    file = tmp_path / "tiny" / "dense" / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    _, err = _cli("run", RECIPE, f"folder={tmp_path}", "--stages", "prune", code=2)
    assert "model.safetensors is not the file that was signed" in err


_LONG = ("--stages", "dense", "dense.steps=120", "dense.checkpoint_every=20")


def _started(folder, *overrides, step=30, sigint=signal.SIG_DFL):
    """The command, at work beyond `step`; by the 30th its first checkpoint is written."""
    process = subprocess.Popen(
        _command("run", RECIPE, f"folder={folder}", *_LONG, *overrides), stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
        # In a shell's background Ctrl-C is ignored, under nohup SIGHUP, and that is inherited from the tests.
        preexec_fn=lambda: (signal.signal(signal.SIGINT, sigint), signal.signal(signal.SIGHUP, signal.SIG_DFL)))
    metrics, deadline = folder / "tiny" / "dense.partial" / "metrics.jsonl", time.monotonic() + 120
    while not metrics.is_file() or metrics.read_text().count("\n") < step:
        assert process.poll() is None and time.monotonic() < deadline, f"training did not get to step {step}"
        time.sleep(0.02)
    return process


def test_a_run_that_ctrl_c_and_a_killed_rank_interrupt_ends_with_the_same_bits(tmp_path):
    _cli("run", RECIPE, f"folder={tmp_path / 'undisturbed'}", *_LONG)
    process = _started(tmp_path)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the whole group
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "saved its state; the same command continues from there" in out
    saved = [json.loads(line)["step"] for line in
             (tmp_path / "tiny/dense.partial/metrics.jsonl").read_text().splitlines()][-1]
    assert (tmp_path / f"tiny/dense.partial/checkpoints/step-{saved:08d}/DONE").is_file()

    process = _started(tmp_path, step=saved + 10)
    ranks = [child for child in psutil.Process(process.pid).children(recursive=True)
             if "submitit.core._submit" in " ".join(child.cmdline())]
    assert len(ranks) == 2
    ranks[1].kill()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "stage dense failed" in err and "log:" in err and err.count("\n") == 1
    assert not [rank for rank in ranks if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE]

    _cli("run", RECIPE, f"folder={tmp_path}", *_LONG)
    model = Path("tiny", "dense", "model.safetensors")
    assert (tmp_path / model).read_bytes() == (tmp_path / "undisturbed" / model).read_bytes()


def test_two_commands_on_one_run_folder_do_not_meet_and_cancel_waits_for_the_save(tmp_path):
    process = _started(tmp_path, "dense.steps=5000", sigint=signal.SIG_IGN)  # as in the background of a shell
    try:
        _, err = _cli("run", RECIPE, f"folder={tmp_path}", *_LONG, "dense.steps=5000", code=2)
        assert "is in use by another sparse-train" in err
        told, _ = _cli("cancel", tmp_path / "tiny")
        assert f"waiting for process {process.pid}" in told
        assert "ended: dense was stopped and saved its state; the same command continues from there" in told
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and out.startswith("dense                  started")
    assert _cli("cancel", tmp_path / "tiny")[0] == "nothing is running\n"


@pytest.mark.slow
def test_a_terminal_that_goes_away_ends_the_run_and_its_ranks_save(tmp_path):
    process = _started(tmp_path)
    ranks = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGHUP)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "dense was stopped and saved its state" in out
    assert not [rank for rank in ranks if rank.is_running()]
