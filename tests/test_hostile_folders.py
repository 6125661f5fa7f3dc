"""Model folders that someone else made, broken in every file: one line and exit code 2, or an answer; no traceback, no
hang, no memory that a number in a file asks for."""

import json
import os
import resource
import shutil
import signal

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sparse_train.compress import export_sparse
from sparse_train.config import PruneConfig
from sparse_train.launch.cli import main
from sparse_train.models import save_model
from sparse_train.pruning import prune
from sparse_train.sparse import sparsify
from tests.models import tiny_model

_DEEP = 100_000
_SECONDS, _BYTES = 20, 8 << 30
_FILES = {
    "empty": b"", "cut": b'{"a": [', "list": b"[]", "null": b"null", "number": b"3", "text": b'"x"', "object": b"{}",
    "deep list": b"[" * _DEEP, "deep object": b'{"a":' * _DEEP, "closed": b"[" * _DEEP + b"]" * _DEEP,
    "no utf-8": b'\xff\xfe{"a": 1}', "huge number": b'{"a": 1' + b"0" * 5000 + b"}", "nan": b'{"vocab_size": NaN}',
}
_VALUES = [None, [], {}, "[/x]\x1b[31m\n", -1, 0, 10**9, 10**30, 1.5, float("inf"), {"a": {"b": [None]}}, "../../x"]


def _replace(content):
    return lambda path: path.write_bytes(content)


def _as_folder(path):
    path.unlink(missing_ok=True)
    path.mkdir()


def _as_pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _as_loop(path):
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)


_WAYS = {**{name: _replace(content) for name, content in _FILES.items()}, "folder": _as_folder, "pipe": _as_pipe,
         "loop": _as_loop, "half": lambda path: path.write_bytes(path.read_bytes()[:path.stat().st_size // 2]),
         "missing": lambda path: path.unlink()}


def _with(file, change):
    """A case that changes the object in a JSON file."""
    def apply(folder):
        data = json.loads((folder / file).read_text())
        change(data)
        (folder / file).write_text(json.dumps(data))
    return apply


def _renamed(name):
    def apply(folder):
        (file,) = folder.glob("*.safetensors")
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        save_file({name if "norm" in key else key: tensor for key, tensor in load_file(file).items()}, file, metadata)
    return apply


def _cases():
    """(name, folder to start from, change)."""
    yield "as it is", "dense", lambda folder: None
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json",
                 "model.safetensors"):
        for way, change in _WAYS.items():
            yield f"{file}: {way}", "dense", lambda folder, file=file, change=change: change(folder / file)
    for file in ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "tokenizer.model", "vocab.json",
                 "merges.txt", "processor_config.json", "adapter_config.json"):
        for way in ("empty", "deep list", "list", "number", "folder", "pipe", "loop"):
            yield f"{file}: {way}", "dense", lambda folder, file=file, way=way: _WAYS[way](folder / file)
    for way, change in _WAYS.items():
        if way != "missing":
            def indexed(folder, change=change):
                (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
                index = folder / "model.safetensors.index.json"
                index.touch()
                change(index)
            yield f"index: {way}", "dense", indexed
        yield f"sparse: {way}", "sparse", lambda folder, change=change: change(folder / "sparse.safetensors")
    for file, keys in _KEYS.items():
        for key in keys:
            for value in _VALUES:
                yield f"{file}: {key}={value!r}", "dense", _with(file, lambda data, k=key, v=value: data.update({k: v}))
    for family, files in _OTHERS.items():
        yield f"{family} as it is", family, lambda folder: None
        for file, keys in files.items():
            for key in keys:
                for value in _VALUES:
                    yield f"{family}: {key}={value!r}", family, _with(
                        file, lambda data, k=key, v=value: data.update({k: v}))
    for name in ("[/x]", "\x1b[31mred", "a\nb", "x" * 10_000, "", "\u202e", "é"):
        for kind in ("dense", "sparse"):
            yield f"tensor {name[:20]!r}", kind, _renamed(name)


_KEYS = {
    "config.json": ["model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
                    "intermediate_size", "max_position_embeddings", "rope_parameters", "hidden_act", "head_dim",
                    "dtype", "eos_token_id", "tie_word_embeddings", "attention_dropout", "architectures", "auto_map",
                    "quantization_config", "text_config", "layer_types", "attn_implementation", "is_encoder_decoder",
                    "torch_dtype", "id2label", "num_labels", "sliding_window", "transformers_version",
                    "pad_token_id", "output_hidden_states", "use_cache", "return_dict", "generation_config"],
    "generation_config.json": ["eos_token_id", "max_length", "suppress_tokens", "num_return_sequences", "num_beams",
                               "cache_implementation", "watermarking_config", "temperature", "guidance_scale",
                               "compile_config", "prompt_lookup_num_tokens", "transformers_version"],
    "tokenizer_config.json": ["tokenizer_class", "added_tokens_decoder", "eos_token", "pad_token", "model_max_length",
                              "chat_template", "auto_map", "extra_special_tokens", "backend",
                              "clean_up_tokenization_spaces"],
    "tokenizer.json": ["model", "added_tokens", "normalizer", "pre_tokenizer", "decoder", "post_processor", "version",
                       "truncation", "padding"],
}


_OTHERS = {
    "mpt": {"config.json": ["d_model", "n_heads", "n_layers", "max_seq_len", "expansion_ratio", "attn_config",
                            "vocab_size", "logit_scale", "learned_pos_emb"]},
    "t5": {"config.json": ["d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads",
                           "relative_attention_num_buckets", "relative_attention_max_distance", "feed_forward_proj",
                           "decoder_start_token_id", "is_encoder_decoder"]},
    "whisper": {"config.json": ["encoder_layers", "max_source_positions", "max_target_positions", "num_mel_bins",
                                "decoder_start_token_id", "d_model", "suppress_tokens"],
                "preprocessor_config.json": ["feature_size", "chunk_length", "sampling_rate", "n_fft", "hop_length",
                                             "feature_extractor_type", "padding_value", "n_samples", "dither"]},
}
_RECIPES = {"t5": "configs/numbers/demo.yaml", "whisper": "configs/dialtones/demo.yaml"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    model, processor = tiny_model("llama")
    model.config.max_position_embeddings = 512  # room for the demo's examples
    save_model(folder / "dense", model, processor)
    model = sparsify(model, prune(model, [], PruneConfig(method="magnitude", sparsity=0.5)))
    export_sparse(model, processor, "int8", folder / "sparse")
    for family in _OTHERS:
        model, processor = tiny_model(family)
        model.config.max_seq_len = 512
        save_model(folder / family, model, processor)
    return folder


class _TooLong(BaseException):
    """Nothing that catches Exception stops it."""


def _stop(*_):
    raise _TooLong


def _complaints(name, source, folder, capfd):
    """What is wrong with the ways in which the commands end, one line each."""
    for arguments in (["inspect", str(folder)], ["generate", str(folder), "--prompt", "Tom", "--max-new-tokens", "2"],
                      ["run", _RECIPES.get(source, "configs/demo.yaml"), "--dry-run", f"dense.path={folder}"]):
        if source == "whisper" and arguments[0] == "generate":
            continue  # it takes sound
        signal.signal(signal.SIGALRM, _stop)
        signal.alarm(_SECONDS)
        try:
            code = main(arguments)
        except BaseException as error:
            signal.alarm(0)
            yield f"{arguments[0]}: {type(error).__name__}: {str(error)[:300]}"
            continue
        finally:
            signal.alarm(0)
        out, err = capfd.readouterr()
        told = [line for line in err.splitlines() if line.startswith("sparse-train: ")]
        if code not in ((0,) if name == "as it is" else (0, 2)) or len(told) != (code == 2) or "Traceback" in err:
            yield f"{arguments[0]}: exit code {code}, {err[-300:]!r}"
        if "\x1b" in out + err:
            yield f"{arguments[0]}: escape sequences are printed"
        if code == 2 and str(folder) not in told[0] and "dense.path" not in told[0]:
            yield f"{arguments[0]}: {told[0]} does not name the folder"


def _try(cases, sources, folder, capfd):
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as statm:
        held = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + _BYTES, hard))
    found = []
    try:
        for name, source, change in cases:
            shutil.copytree(sources / source, folder)
            change(folder)
            found += [f"{name}: {complaint}" for complaint in _complaints(name, source, folder, capfd)]
            shutil.rmtree(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert not found, "\n".join(found)


_FEW = ("as it is", "config.json: deep list", "config.json: pipe", "config.json: num_hidden_layers=1000000000",
        "config.json: rope_parameters=[]", "tokenizer.json: list", "tokenizer.json: added_tokens=-1",
        "tokenizer_config.json: null", "generation_config.json: text", "generation_config.json: eos_token_id='../../x'",
        "index: cut", "sparse: half", "tensor '[/x]'")


def test_a_few_broken_folders(sources, tmp_path, capfd):
    cases = [case for case in _cases() if case[0] in _FEW]
    assert {name for name, _, _ in cases} == set(_FEW)
    _try(cases, sources, tmp_path / "model", capfd)


@pytest.mark.slow
def test_all_broken_folders(sources, tmp_path, capfd):
    _try(_cases(), sources, tmp_path / "model", capfd)
