"""GGUF files become dense folders: per tensor what gguf's own reference dequantises, and one line where they cannot."""

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize, get_tensor_name_map, quantize

from sparse_train.config import RunConfig
from sparse_train.errors import UserError
from sparse_train.launch.submit.validate import validate
from sparse_train.models import as_folder, load_model, load_processor, own_tensors, read_config
from sparse_train.models import gguf as module
from tests.models import tiny_model
from tests.weights import needs_weights

_TEXT = "Tom  has 12 boxes of 345.\n\n  6 é"
_TEMPLATE = "{% for m in messages %}<|endoftext|>{{ m['content'] }}{% endfor %}"
_BY_NAME = {"attn": GGMLQuantizationType.Q8_0, "ffn": GGMLQuantizationType.Q4_1, "token_embd": GGMLQuantizationType.F16}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", tmp_path / "assets")
    as_folder.cache_clear()
    yield
    as_folder.cache_clear()


def _llama():
    return tiny_model("llama", n_kv_heads=2)


def _permuted(name, weight, config):
    """Rows of queries and keys as llama.cpp orders them, whose rotary pairs are neighbours."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2])
    if not heads:
        return np.arange(len(weight))
    return np.arange(len(weight)).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def _write(file, change=lambda writer: None, leave_out=(), arch="llama"):
    """A GGUF of a tiny Llama at `file`; (the model whose tensors are those of the file, dequantised, its processor)."""
    model, processor = _llama()
    config, tokenizer = model.config, processor.tokenizer
    writer = GGUFWriter(file, arch)
    for key, value in (("context_length", 256), ("embedding_length", config.hidden_size),
                       ("feed_forward_length", config.intermediate_size), ("block_count", config.num_hidden_layers),
                       ("attention.head_count", config.num_attention_heads), ("vocab_size", config.vocab_size),
                       ("attention.head_count_kv", config.num_key_value_heads)):
        writer.add_uint32(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_float32(f"{arch}.rope.freq_base", config.rope_parameters["rope_theta"])
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([token for token, _ in vocabulary])
    writer.add_token_types([3 if token.startswith("<|") else 1 for token, _ in vocabulary])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(_TEMPLATE)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in own_tensors(model).items():
        theirs = names.get_name(name.removesuffix(".weight")) + ".weight"
        if theirs in leave_out:
            continue
        order = _permuted(theirs, tensor, config)
        kind = _BY_NAME.get(next((part for part in _BY_NAME if part in theirs and tensor.ndim > 1), ""),
                            GGMLQuantizationType.F32)
        stored = quantize(tensor.detach().numpy()[order], kind)
        writer.add_tensor(theirs, stored, raw_dtype=kind)
        with torch.no_grad():
            tensor[order] = torch.from_numpy(dequantize(stored, kind).astype(np.float32))
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, processor


def test_a_gguf_file_is_read_as_its_dequantised_tensors(tmp_path, caplog, monkeypatch):
    file = tmp_path / "tiny.Q4_1.gguf"
    (tmp_path / "tokenizer_config.json").write_text("not JSON")  # what lies beside it is not read
    model, processor = _write(file)
    again = load_model(str(file))
    expected, found = model.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    read = load_processor(file)
    ids = read.tokenizer(_TEXT, return_tensors="pt").input_ids
    assert ids.tolist() == [processor.tokenizer.encode(_TEXT)] and read.tokenizer.chat_template == _TEMPLATE
    assert read.tokenizer.special_tokens_map == processor.tokenizer.special_tokens_map
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert "dequantised to fp32 from Q8_0 (8 tensors), Q4_1 (6), F32 (6), F16 (1); the model is in" in caplog.text
    header, folder = read_config(file).to_dict(), read_config(as_folder(file)).to_dict()
    assert {key for key in header | folder if header.get(key) != folder.get(key)} <= {"dtype", "_name_or_path"}

    as_folder.cache_clear()
    monkeypatch.setattr(module, "_convert", None)
    assert as_folder(str(file)) == as_folder(file)  # no second conversion
    file.touch()
    as_folder.cache_clear()
    with pytest.raises(TypeError):  # unless the file has changed
        as_folder(file)


def test_one_of_several_ranks_converts(tmp_path, monkeypatch):
    _write(tmp_path / "tiny.gguf")
    calls, convert = [], module._convert
    monkeypatch.setattr(module, "_convert", lambda *args: (calls.append(args), convert(*args)))
    with ThreadPoolExecutor() as ranks:
        folders = set(ranks.map(as_folder.__wrapped__, [tmp_path / "tiny.gguf"] * 3))
    assert len(folders) == len(calls) == 1


def test_a_dry_run_reads_the_header_alone(tmp_path):
    _write(tmp_path / "tiny.gguf")
    run = RunConfig.model_validate({
        "prune": {"sparsity": 0.5}, "dense": {"path": str(tmp_path / "tiny.gguf")},
        "evaluate": {"max_new_tokens": 8}, "benchmark": {"new_tokens": 8}})
    planned = validate(run, dry_run=True)
    assert not (tmp_path / "assets").exists() and any("only its header is read" in line for line in planned.remarks)
    assert validate(run).parameters.total == planned.parameters.total
    assert (tmp_path / "assets").exists()


def _scaled(writer):
    writer.add_tensor("rope_freqs.weight", np.ones(4, np.float32))


@pytest.mark.parametrize("change, told", [
    (dict(change=_scaled), r"its rotary frequencies are scaled \(rope_freqs.weight\)"),
    (dict(change=lambda writer: writer.add_string("llama.rope.scaling.type", "yarn")), r"are scaled \(yarn\)"),
    (dict(change=lambda writer: writer.add_uint16("split.count", 3)), "is one of 3 parts; merge them"),
    (dict(change=lambda writer: writer.add_tensor("blk.0.attn_q.bias", np.ones(32, np.float32))),
     "holds 32 numbers that transformers does not read into a llama model"),
    (dict(leave_out=["blk.1.ffn_up.weight"]), "lacks 1 tensors of a llama model, such as model.layers.1.mlp.up_proj"),
    (dict(arch="clip"), "architecture clip is not supported"),
], ids=["rope_freqs", "yarn", "split", "bias", "missing", "architecture"])
def test_what_transformers_would_not_read_is_refused(change, told, tmp_path):
    file = tmp_path / "tiny.gguf"
    _write(file, **change)
    with pytest.raises(UserError, match=told) as error:
        as_folder(file)
    assert str(file.name) in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.glob("assets/sparse-train/gguf/*/DONE"))


def test_a_damaged_file_and_a_full_machine_are_told_in_one_line(tmp_path, monkeypatch):
    file, damaged = tmp_path / "tiny.gguf", tmp_path / "damaged.gguf"
    _write(file)
    whole = file.read_bytes()
    for data in (whole[:-100], whole[:2000], whole[:30], b"", b"PK" + whole[2:]):
        damaged.write_bytes(data)
        with pytest.raises(UserError, match=r"cannot read a GGUF file from .*it is damaged, or incomplete") as error:
            load_model(damaged)
        assert "\n" not in str(error.value)
        with pytest.raises(UserError, match=r"damaged\.gguf"):
            read_config(damaged)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(UserError, match=r"becomes a model of 0\.0 GB, and .* has 0\.0 GB free; .*HF_HOME"):
        as_folder(file)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    for read in (as_folder, read_config):
        with pytest.raises(UserError, match=r"^accelerate not installed; pip install 'sparse-train\[gguf\]'$"):
            read(file)
    with pytest.raises(UserError, match=r"there is no file .*nowhere\.gguf; a GGUF file is read from this machine"):
        as_folder(tmp_path / "nowhere.gguf")
    file.rename(tmp_path / "assets" / "tiny.gguf")
    with pytest.raises(UserError, match=r"give the path of that file: .*tiny\.gguf"):
        load_model(tmp_path / "assets")


@pytest.mark.slow
def test_a_published_file_is_read_in_full(tmp_path):
    file = needs_weights("smollm2-135m")
    reader, model = GGUFReader(file), load_model(file)
    tensors = {tensor.name: dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    own = own_tensors(model)
    assert len(own) == len(tensors) == 272
    for name, tensor in own.items():
        theirs = names.get_name(name.removesuffix(".weight")) + ".weight"
        order = _permuted(theirs, tensor, model.config)
        np.testing.assert_array_equal(tensor.detach().numpy()[order], tensors[theirs], name)
    tokenizer = load_processor(file).tokenizer
    assert tokenizer.tokenize("  60%") == ["ĠĠ", "6", "0", "%"]
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}],
                                           add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt["input_ids"].shape[1]:]
    assert "Paris" in tokenizer.decode(answer)
