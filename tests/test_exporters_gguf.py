"""GGUF files hold the weights and the tokenizer of the folder that they were made from, and llama.cpp computes the same
with them."""

import json
import subprocess

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.tokenization_utils_base import generate_merges

from sparse_train.compat.transformers import gguf_text_splits
from sparse_train.errors import UserError
from sparse_train.exporters import export
from sparse_train.launch.cli import main
from sparse_train.models import as_folder, load_model, load_processor, own_tensors, read_config, save_model
from tests.environments import python_with
from tests.models import tiny_model, tiny_tokenizer
from tests.test_exporters import sparse_folder
from tests.weights import needs_weights

_TEXTS = ("Tom  has 12 boxes of 345.\n\n  6 é", "  60%  a  b ", "<|endoftext|>Hi, I don't")
# llama.cpp's parts of names -> ours.
_LLAMA = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
          "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
          "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
          "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
          "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "blk": "model.layers"}
_NAMES = {
    "llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "qwen3": _LLAMA,
    "olmo2": _LLAMA | {"post_attention_norm": "post_attention_layernorm",
                       "post_ffw_norm": "post_feedforward_layernorm"},
    "mpt": {"token_embd": "transformer.wte", "output_norm": "transformer.norm_f", "attn_qkv": "attn.Wqkv",
            "attn_output": "attn.out_proj", "ffn_up": "ffn.up_proj", "ffn_down": "ffn.down_proj",
            "attn_norm": "norm_1", "ffn_norm": "norm_2", "blk": "transformer.blocks", "output": "lm_head"},
    "gpt_neox": {"token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "lm_head",
                 "attn_qkv": "attention.query_key_value", "attn_output": "attention.dense",
                 "ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h", "attn_norm": "input_layernorm",
                 "ffn_norm": "post_attention_layernorm", "blk": "gpt_neox.layers"},
}
_READ_BY_TRANSFORMERS = ("llama", "mistral", "qwen2")
_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0}
_SCALED = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 64}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", tmp_path / "assets")
    as_folder.cache_clear()


def _dense(folder, family, tokenizer=None):
    """Biases and norms that differ from their initial values, so that each is seen to be there."""
    torch.manual_seed(0)
    if family == "qwen2":
        model, processor = Qwen2ForCausalLM(Qwen2Config(**_SIZES)), tiny_tokenizer()
    elif family == "llama-3":
        model, processor = LlamaForCausalLM(LlamaConfig(**_SIZES, rope_parameters=_SCALED)), tiny_tokenizer()
    else:
        kv_heads = {} if family in ("mpt", "gpt_neox") else {"n_kv_heads": 2}
        model, processor = tiny_model(family, **kv_heads)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.3)
    save_model(folder, model, tokenizer or processor)
    return model.eval()


def _ours(name, family):
    *block, part, last = name.split(".")
    names = _NAMES[family]
    return ".".join([*([names["blk"], block[1]] if block else []), names[part], last])


def _in_our_order(name, weight, family, config):
    """Rows of queries and keys, whose rotary pairs are neighbours in a GGUF file of Llama; GPT-NeoX's parts of all
    heads."""
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}.get(name.split(".")[-2])
    if family in ("llama", "mistral") and heads:
        return weight.reshape(getattr(config, heads), -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)
    if family == "gpt_neox" and "attn_qkv" in name:
        parts = weight.reshape(3, config.num_attention_heads, -1, *weight.shape[1:])
        return parts.swapaxes(0, 1).reshape(weight.shape)
    return weight


def _read(file, family, config):
    """Tensors by our names, float32, and the type of each."""
    found = {}
    for tensor in GGUFReader(file).tensors:
        weight = dequantize(tensor.data, tensor.tensor_type)
        found[_ours(tensor.name, family)] = (torch.from_numpy(np.array(_in_our_order(
            tensor.name, weight, family, config), np.float32)), tensor.tensor_type.name)
    return found


@pytest.mark.parametrize("family", _NAMES)
def test_every_tensor_is_that_of_the_folder_in_the_order_of_llama_cpp(tmp_path, family):
    model = _dense(tmp_path / "dense", family)
    for type_, step in (("F32", 0), ("Q4_1", 1 / 15), ("BF16", 2 ** -8)) if family == "llama" else (("F32", 0),):
        export(tmp_path / "dense", "gguf", tmp_path / f"{type_}.gguf", type_)
        found = _read(tmp_path / f"{type_}.gguf", family, model.config)
        expected = own_tensors(model)
        assert found.keys() == expected.keys()
        for name, weight in expected.items():
            tensor, kind = found[name]
            is_block = name.startswith(_NAMES[family]["blk"])
            assert kind == ("F32" if weight.ndim == 1 else type_ if is_block or type_ != "Q4_1" else "Q8_0"), name
            exact = step == 0 or weight.ndim == 1
            within = 0 if exact else float(weight.detach().abs().max()) * (step if is_block else max(1 / 254, 2 ** -8))
            torch.testing.assert_close(tensor, weight.detach(), rtol=0, atol=within, msg=name)


@pytest.mark.parametrize("family", _READ_BY_TRANSFORMERS)
def test_a_file_becomes_the_same_folder_again(tmp_path, family):
    model, prompt = _dense(tmp_path / "dense", family), torch.arange(5, 25)[None]
    assert main(["export", str(tmp_path / "dense"), "--to", "gguf", str(tmp_path / "out.gguf")]) == 0
    again = load_model(tmp_path / "out.gguf")
    assert torch.equal(again(prompt).logits, model(prompt).logits)
    read, source = (load_processor(tmp_path / name).tokenizer for name in ("out.gguf", "dense"))
    for text in _TEXTS:
        assert read(text).input_ids == source(text).input_ids
    assert (read.eos_token, read.bos_token, read.pad_token) == (source.eos_token, source.bos_token, source.pad_token)


@pytest.mark.parametrize(("family", "precision", "kind"), [
    ("llama", "int8", "Q8_0"), ("gpt_neox", "int4", "Q4_0"), ("mpt", "int4", "Q4_0"), ("mpt", "bf16", "BF16")])
def test_codes_of_a_sparse_folder_are_kept(tmp_path, family, precision, kind):
    int8_head = family == "mpt" and precision == "int4"
    expected = sparse_folder(tmp_path / "sparse", family, precision, int8_head)
    export(tmp_path / "sparse", "gguf", tmp_path / "out.gguf")
    found = _read(tmp_path / "out.gguf", family, read_config(tmp_path / "sparse"))
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        tensor, stored = found[name]
        is_block = name.startswith(_NAMES[family]["blk"]) and weight.ndim > 1
        assert stored == (kind if is_block else "F32" if weight.ndim == 1 else "BF16" if kind == "BF16" else "Q8_0")
        if weight.ndim == 1 or kind == "BF16":
            assert torch.equal(tensor, weight), name
        elif is_block or (int8_head and name == "lm_head.weight"):  # codes, whose scale is rounded to fp16
            torch.testing.assert_close(tensor, weight, rtol=2 ** -11, atol=0, msg=name)
        else:
            torch.testing.assert_close(tensor, weight, rtol=0, atol=float(weight.abs().max()) / 239, msg=name)


def _with_split(*steps):
    tokenizer = Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps]) if len(steps) > 1 else steps[0]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>",
                                   pad_token="<|pad|>")


def _regex_split(name):
    return _with_split(pre_tokenizers.Split(Regex(gguf_text_splits()[name]), "isolated"),
                       pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))


def _sentencepiece():
    """As Llama 2's: BPE on characters, a byte for what it does not know, and every merge that makes a token."""
    special = ["<unk>", "<s>", "</s>"]
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.train_from_iterator(["Tom has 12 boxes of 345 eggs, and a hen of a box has it"] * 9, trainers.BpeTrainer(
        vocab_size=80, special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))], show_progress=False))
    vocabulary = trained.get_vocab()
    merges = generate_merges(vocabulary, {token: -rank for token, rank in vocabulary.items()})
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = trained.normalizer
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


_TOKENIZERS = {
    "gpt-2": lambda: _with_split(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "smollm": tiny_tokenizer, "dbrx": lambda: _regex_split("llama-bpe"), "qwen2": lambda: _regex_split("qwen2"),
    "tekken": lambda: _regex_split("tekken"), "default": _sentencepiece}


@pytest.mark.parametrize("split", _TOKENIZERS)
def test_the_way_to_split_text_has_its_name(tmp_path, split):
    _dense(tmp_path / "dense", "llama", _TOKENIZERS[split]())
    export(tmp_path / "dense", "gguf", tmp_path / "out.gguf")
    fields = GGUFReader(tmp_path / "out.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == split
    assert fields["tokenizer.ggml.model"].contents() == ("llama" if split == "default" else "gpt2")
    types = fields["tokenizer.ggml.token_type"].contents()
    assert types.count(3) == (3 if split == "default" else 2) and types.count(6) == (256 if split == "default" else 0)


def test_what_llama_cpp_does_not_have_is_refused_in_one_line(tmp_path):
    _dense(tmp_path / "llama", "llama")
    keys = json.loads((tmp_path / "llama" / "config.json").read_text())
    for name, change in (("act", {"hidden_act": "gelu"}),
                         ("rope", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}})):
        _dense(tmp_path / name, "llama")
        (tmp_path / name / "config.json").write_text(json.dumps(keys | change))
    save_model(tmp_path / "opt", *tiny_model("opt"))
    save_model(tmp_path / "narrow", *tiny_model("llama", d_ff=80))
    _dense(tmp_path / "split", "llama", _with_split(pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(False)))
    for name, told in (("act", "its activation is gelu, and llama.cpp computes silu in llama models"),
                       ("rope", r"its rotary frequencies are scaled \(dynamic\)"),
                       ("opt", "opt models are not written as GGUF; give one of llama, mistral, qwen2"),
                       ("narrow", "has 80 columns, and a block of GGUF has 32; give --type F32, F16 or BF16"),
                       ("split", r"splits text in a way that llama.cpp has no name for \(Whitespace, ByteLevel\)")):
        with pytest.raises(UserError, match=told):
            export(tmp_path / name, "gguf", tmp_path / "out.gguf", "Q8_0")
        assert not list(tmp_path.glob("*out.gguf*"))


_ASK = """
import json, sys, urllib.request
import xllamacpp as api
for asked in json.load(open(sys.argv[1])):
    settings = api.CommonParams()
    settings.model.path, settings.n_ctx, settings.port, settings.warmup = asked["file"], 512, 0, False
    settings.n_parallel = settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.cache_type_k = settings.cache_type_v = api.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = api.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = api.Server(settings)
    def ask(path, **data):
        request = urllib.request.Request(server.listening_address + path, json.dumps(data).encode(),
                                         {"Content-Type": "application/json"})
        return json.load(urllib.request.urlopen(request))
    reply = {"tokens": [ask("/tokenize", content=text, add_special=True)["tokens"] for text in asked["texts"]]}
    if asked["prompt"]:
        reply["first"] = ask("/completion", prompt=asked["prompt"], n_predict=8, n_probs=asked["vocabulary"],
                             temperature=-1)["completion_probabilities"][0]["top_logprobs"]
    if "question" in asked:
        messages = [{"role": "user", "content": asked["question"]}]
        reply["answer"] = ask("/v1/chat/completions", messages=messages, temperature=0,
                              max_tokens=20)["choices"][0]["message"]["content"]
    print("REPLY", json.dumps(reply), flush=True)
"""


@pytest.fixture(scope="module")
def ask_llama_cpp(tmp_path_factory):
    """A function: requests -> llama.cpp's replies, through a package that has it compiled."""
    folder = tmp_path_factory.mktemp("llama.cpp")
    try:
        python = python_with(folder / "python", "xllamacpp==2026.10.11549")
    except OSError as error:
        pytest.skip(str(error))

    def ask(asked):
        (folder / "asked.json").write_text(json.dumps(asked))
        done = subprocess.run([python, "-c", _ASK, folder / "asked.json"], check=True, capture_output=True, text=True)
        replies = [line.removeprefix("REPLY ") for line in done.stdout.splitlines() if line.startswith("REPLY ")]
        assert len(replies) == len(asked)
        return list(map(json.loads, replies))

    return ask


def _ascii_prompt(model, tokenizer):
    """One behind which the most likely token is ASCII: llama.cpp gives no probabilities of a part of a character."""
    for first in range(5, 200):
        prompt = torch.arange(first, first + 20)[None]
        if tokenizer.decode(model(prompt).logits[0, -1].argmax()).isascii():
            return prompt
    raise AssertionError


@pytest.mark.slow
def test_llama_cpp_computes_the_models(tmp_path, ask_llama_cpp):
    asked, expected = [], []
    for family in (*_NAMES, "llama-3"):
        model = _dense(tmp_path / family, family)
        export(tmp_path / family, "gguf", tmp_path / f"{family}.gguf")
        prompt = _ascii_prompt(model, tiny_tokenizer())
        asked.append({"file": str(tmp_path / f"{family}.gguf"), "prompt": prompt[0].tolist(), "texts": _TEXTS,
                      "vocabulary": model.config.vocab_size})
        expected.append(model(prompt).logits[0, -1].log_softmax(-1))
    for (family, reply), logits in zip(zip((*_NAMES, "llama-3"), ask_llama_cpp(asked), strict=True), expected,
                                       strict=True):
        found = torch.tensor([one["logprob"] for one in sorted(reply["first"], key=lambda one: one["id"])])
        # Of exact weights; llama.cpp's GELU is the one of tanh, from a table in fp16.
        within = 2e-3 if family in ("mpt", "gpt_neox") else 1e-5
        torch.testing.assert_close(found, logits, rtol=0, atol=within, msg=family)
        assert reply["tokens"] == [tiny_tokenizer()(text).input_ids for text in _TEXTS]


@pytest.mark.slow
def test_llama_cpp_makes_the_tokens_of_the_tokenizer(tmp_path, ask_llama_cpp):
    asked = []
    for split, make in _TOKENIZERS.items():
        torch.manual_seed(0)
        tokenizer = make()
        model = LlamaForCausalLM(LlamaConfig(**_SIZES | {"vocab_size": len(tokenizer)}))
        save_model(tmp_path / split, model, tokenizer)
        export(tmp_path / split, "gguf", tmp_path / f"{split}.gguf")
        asked.append({"file": str(tmp_path / f"{split}.gguf"), "prompt": None, "texts": _TEXTS})
    for split, reply in zip(_TOKENIZERS, ask_llama_cpp(asked), strict=True):
        assert reply["tokens"] == [_TOKENIZERS[split]()(text).input_ids for text in _TEXTS], split


@pytest.mark.slow
def test_llama_cpp_answers_a_question(tmp_path, ask_llama_cpp):
    source = needs_weights("smollm2-135m")
    export(source, "gguf", tmp_path / "out.gguf")
    tokenizer = load_processor(source).tokenizer
    (reply,) = ask_llama_cpp([{"file": str(tmp_path / "out.gguf"), "prompt": None, "texts": _TEXTS,
                               "question": "What is the capital of France?"}])
    assert "Paris" in reply["answer"]
    assert reply["tokens"] == [tokenizer(text).input_ids for text in _TEXTS]
