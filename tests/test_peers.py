"""Other engines beside ours: their models have our weights, their replies and mistakes are told in one line."""

import json
import os
import sys

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize

from sparse_train import kernels
from sparse_train.bench import peers
from sparse_train.bench.peers import engine, environment
from sparse_train.bench.peers.engine import Engine, parse_reply
from sparse_train.bench.peers.environment import make_environment
from sparse_train.bench.peers.worker import answer
from sparse_train.bench.shapes import PRECISIONS, SHAPES
from sparse_train.compress import export_sparse
from sparse_train.config import ModelConfig
from sparse_train.errors import UserError
from sparse_train.launch.cli import main
from sparse_train.models import load_model, save_model
from sparse_train.sparse import BitmaskTensor, sparsify
from tests.models import tiny_model
from tests.weights import needs_weights

_SHORT = ("--prompt-tokens", "9", "--new-tokens", "3", "--repeats", "1")
_FAMILIES = {"llama": {"n_kv_heads": 2}, "mpt": {}}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", tmp_path / "assets")
    monkeypatch.setattr(kernels, "read_bandwidth", lambda: 1e10)


def _dense(folder, family, **size):
    model, processor = tiny_model(family, **_FAMILIES.get(family, {}), **size)
    save_model(folder, model, processor)
    return model


@pytest.mark.parametrize("family", _FAMILIES)
def test_bytes_of_a_file_are_those_that_a_token_reads(tmp_path, family):
    """MPT's embedding is its head as well."""
    _dense(tmp_path / "dense", family)
    num_bytes = peers.write_gguf(tmp_path / "dense", "Q8_0", tmp_path / "model.gguf")
    sizes = {tensor.name: tensor.n_bytes for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert num_bytes == sum(sizes.values()) - (family == "llama") * sizes["token_embd.weight"]


def test_a_worker_decodes_greedily_from_the_prompt_on():
    """Of an engine whose next token is the last one times three, of the text that it was fed."""
    text = []

    def feed(tokens, start):
        assert start in (0, len(text))
        text[start:] = tokens
        return np.eye(100)[text[-1] * 3 % 100]

    for _ in range(2):
        found = answer(feed, [5, 1], 4)
        assert found["tokens"] == [3, 9, 27, 81] and text == [5, 1, 3, 9, 27]
        assert found["first_seconds"] > 0 < found["later_seconds"]
    assert np.argmax(answer(feed, [5, 1], 0)["logits"]) == 3


def test_replies_of_another_form_are_told():
    fields = {"tokens": list, "first_seconds": float}
    good = {"tokens": [1], "first_seconds": 0.5, "more": None}
    assert parse_reply("x", json.dumps(good), fields) == good
    for line in ("", "Loading...\n", "[1]", '{"tokens": [1]}', '{"tokens": 1, "first_seconds": 0.5}'):
        with pytest.raises(UserError, match=r"x answered .*which is not tokens, first_seconds; leave it out"):
            parse_reply("x", line, fields)


_WORKER = """
import json, sys
print("{}", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked["prompt"] == [0]:
        sys.exit("GGML_ASSERT(eps > 0.0f) failed")
    print(json.dumps({"tokens": [7] * asked["new_tokens"], "first_seconds": 0.5, "later_seconds": 2.0}
                     if asked["new_tokens"] else {"logits": [1.0] * 300}), flush=True)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Engines of this Python, which give the same answer to any prompt."""
    (tmp_path / "worker.py").write_text(_WORKER)
    monkeypatch.setattr(engine, "_WORKER", tmp_path / "worker.py")
    monkeypatch.setattr(peers, "make_environment", lambda *arguments: sys.executable)


def test_an_engine_answers_or_its_end_is_told(tmp_path, fake):
    running = Engine(sys.executable, "x", tmp_path / "x.gguf", 1, 1, 9)
    assert running.decode([1, 2], 4) == (0.5, 2.0) and running.logits([1]).shape == (300,)
    with pytest.raises(UserError, match=r"x ended with exit code 1: GGML_ASSERT\(eps > 0.0f\) failed; leave it out"):
        running.decode([0], 4)
    with pytest.raises(UserError, match="ended with exit code"):
        running.logits([1])
    running.close()


@pytest.mark.parametrize("family", _FAMILIES)
def test_peers_are_rows_beside_ours(tmp_path, fake, family, capsys, caplog):
    model = _dense(tmp_path / "dense", family)
    linears = {name: module for name, module in model.named_modules()
               if isinstance(module, torch.nn.Linear) and name != "lm_head"}
    sparsify(model, {name: BitmaskTensor.from_dense(linear.weight.detach(), torch.rand(linear.weight.shape) < 0.5)
                     for name, linear in linears.items()})
    export_sparse(model, tiny_model(family)[1], "int8", tmp_path / "int8", int8_head=True)
    command = ["bench", "decode", "--model", str(tmp_path / "dense"), str(tmp_path / "int8"), "--peers", "all", *_SHORT]
    assert main([*command, "--threads", "1", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    rows = {(row["engine"], row["precision"]): row for row in json.loads(line)["rows"]}
    expected = {(name, precision) for name, peer in peers.PEERS.items() for precision in peer.precisions
                if family in (peer.families or (family,))}
    assert rows.keys() == expected | {("torch", "fp32"), ("torch", "bf16"), ("sparse", "int8")}
    for key in expected:
        assert rows[key]["milliseconds"] == 1e3 and rows[key]["first_token_milliseconds"] == 500
        is_whole = key[0] != "onnxruntime"
        assert rows[key]["bytes"] > 0 and rows[key]["what"] == ("decode" if is_whole else "linears")
        assert rows[key]["logit_error"] == (pytest.approx(1) if is_whole else None)
    assert rows["torch", "fp32"]["logit_error"] == 0 < rows["torch", "bf16"]["logit_error"] < 0.1
    assert rows["sparse", "int8"]["logit_error"] is None and "does not compute this model" in caplog.text
    # Of an embedding that is not the head a token reads a row.
    weights = sum(linear.weight.numel() for linear in linears.values())
    head = model.config.vocab_size * model.config.hidden_size
    assert weights // 2 < rows["sparse", "int8"]["bytes"] < 2 * (weights + head) < rows["torch", "fp32"]["bytes"]
    for name, peer in peers.PEERS.items():
        is_told = any(message.startswith(f"{name} is left out") for message in caplog.messages)
        assert is_told == (family not in (peer.families or (family,)))
    assert main([*command[:-7], "torch-bf16", *_SHORT]) == 0
    assert "9 prompt tokens" in capsys.readouterr().out


def test_logits_are_compared_with_those_of_the_same_model_alone(tmp_path, fake, capsys, caplog):
    """Other dense folders have another vocabulary, or need an encoder's input."""
    _dense(tmp_path / "dense", "mpt")
    _dense(tmp_path / "other", "mpt", vocab_size=640)
    _dense(tmp_path / "t5", "t5")
    folders = [str(tmp_path / name) for name in ("dense", "other", "t5")]
    assert main(["bench", "decode", "--model", *folders, "--peers", "torch-bf16", *_SHORT, "--json"]) == 0
    errors = {(row["model"], row["precision"]): row["logit_error"]
              for row in json.loads(capsys.readouterr().out)["rows"]}
    assert 0 < errors.pop((folders[0], "bf16")) < 0.1
    assert errors == {(folders[0], "fp32"): 0, (folders[1], "fp32"): None, (folders[2], "fp32"): None}
    assert "does not compute this model" not in caplog.text


@pytest.mark.parametrize(("size", "changes", "told"), [
    ({}, {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "are scaled (dynamic)"),
    ({"d_ff": 80}, {}, "has 80 columns")])
def test_peers_whose_file_cannot_hold_the_model_are_left_out(tmp_path, fake, monkeypatch, size, changes, told, capsys,
                                                             caplog):
    """Before they are installed; the others are measured."""
    installed = []
    monkeypatch.setattr(peers, "make_environment", lambda name, *rest: installed.append(name) or sys.executable)
    _dense(tmp_path / "dense", "llama", **size)
    config = tmp_path / "dense" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    assert main(["bench", "decode", "--model", str(tmp_path / "dense"), "--peers", "all", *_SHORT, "--json"]) == 0
    assert {row["engine"] for row in json.loads(capsys.readouterr().out)["rows"]} == {"torch", "onnxruntime"}
    assert installed == ["onnxruntime"]
    for name in ("llama.cpp", "ik_llama.cpp", "openvino"):
        assert any(message.startswith(f"{name} is left out") and told in message for message in caplog.messages)


def test_a_shape_is_measured_dense_and_sparse(monkeypatch, capsys):
    monkeypatch.setitem(SHAPES, "tiny", ModelConfig(family="mpt", d_model=64, n_layers=1, n_heads=2, vocab_size=512))
    assert main(["bench", "decode", "--shape", "tiny", "--sparsity", "0.75", "--json", *_SHORT]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["model"] for row in rows} == {"tiny"}
    found = [(row["precision"], row["sparsity"]) for row in rows]
    assert [precision for precision, _ in found] == ["fp32", *PRECISIONS] and {"fp32", "int8"} <= {*PRECISIONS}
    assert [sparsity for _, sparsity in found] == pytest.approx([0] + [0.75] * len(PRECISIONS), abs=0.02)


def test_what_cannot_be_compared_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    model = _dense(tmp_path / "dense", "mpt")
    sparsify(model, {"transformer.blocks.0.attn.Wqkv": BitmaskTensor.from_dense(
        *(torch.ones_like(model.transformer.blocks[0].attn.Wqkv.weight, dtype=dtype)
          for dtype in (torch.float32, torch.bool)))})
    save_model(tmp_path / "sparse", model, tiny_model("mpt")[1])
    monkeypatch.setattr(environment.sys, "executable", "false")
    for arguments, told in (
            (["--shape", "mpt-1t"], "there is no such shape; give one of mpt-506m,"),
            (["--model", tmp_path / "dense", "--peers", "vllm"], "--peers vllm: there is no such peer; give all, or"),
            (["--model", tmp_path / "dense", "--sparsity", "0.5"], "--sparsity is of --shape's random weights, and a"),
            (["--model", tmp_path / "dense", "--threads", "4000"], "--threads 4000: this process may use"),
            (["--model", tmp_path / "sparse", "--peers", "torch-bf16"], "other engines run dense decoders; give"),
            (["--model", tmp_path / "dense", "--peers", "llama.cpp"], "llama.cpp cannot be installed: no output;")):
        assert main(["bench", "decode", *map(str, arguments), *_SHORT]) == 2
        assert told in capsys.readouterr().err.splitlines()[-1]


def test_an_environment_is_made_once_and_says_why_it_cannot_be(tmp_path, monkeypatch, caplog):
    (tmp_path / "python").write_text('#!/bin/sh\necho "ERROR: no $2 for $4" >&2; echo more\n[ "$4" != bad ]\n')
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(environment.sys, "executable", "true")
    real = environment.subprocess.run

    def run(command, **options):
        if command[0] == "true":
            return real(["true"])
        return real([tmp_path / "python", *command[1:]], **options)

    monkeypatch.setattr(environment.subprocess, "run", run)
    with pytest.raises(UserError, match="x cannot be installed: no pip for bad; make the package index reachable, or"):
        make_environment("x", ("bad",), {"A": "b"})
    assert "x: making an environment in " in caplog.text and "once: A=b pip install bad" in caplog.text
    caplog.clear()
    paths = {make_environment("x", ("good",), {}) for _ in range(2)}
    assert len(paths) == 1 and len(caplog.records) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", peers.PEERS)
def test_a_peer_computes_the_model(tmp_path, monkeypatch, name):
    """Installs it. Tokens are those of dense torch."""
    monkeypatch.undo()  # in the user's cache
    peer = peers.PEERS[name]
    if peer.variables and not os.environ.get("COMPILE_PEERS"):
        pytest.skip(f"{name} is compiled, which takes many minutes: COMPILE_PEERS=1 does it")
    try:
        python = make_environment(name, peer.install, peer.variables)
    except UserError as error:
        pytest.skip(str(error))
    prompt = list(range(5, 25))
    for family in peer.families or ("mpt",):
        model = _dense(tmp_path / family, family)
        file = tmp_path / f"{family}.gguf"
        running = Engine(python, name, file, peer.prepare(tmp_path / family, peer.precisions[-1], file), 1, 64)
        expected = model(torch.tensor([prompt])).logits[0, -1]
        if peer.what == "decode":
            assert (running.logits(prompt) - expected).norm() < 0.1 * expected.norm()
        assert running.decode(prompt, 8)[1] > 0
        running.close()


@pytest.mark.slow
def test_a_gguf_file_becomes_the_same_weights_again(tmp_path):
    """SmolLM2's own blocks, from a folder that its GGUF file became, but for the rounding of scales."""
    source = needs_weights("smollm2-135m")
    peers.write_gguf(source, "Q4_1", tmp_path / "again.gguf")
    expected, found = ({t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(file).tensors}
                       for file in (source, tmp_path / "again.gguf"))
    assert expected.keys() == found.keys()
    for name, weight in expected.items():
        np.testing.assert_allclose(found[name], weight, rtol=0, atol=2e-3 * np.abs(weight).max(), err_msg=name)
    assert load_model(source).config.vocab_size == len(found["token_embd.weight"])
