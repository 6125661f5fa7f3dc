"""Models as folders, ours and published ones: every way in reads the same, and refuses the same in one line."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparse_train.config import PruneConfig
from sparse_train.errors import UserError
from sparse_train.inference import load
from sparse_train.models import load_model, load_processor, open_model, own_tensors, read_config, save_model
from sparse_train.pruning import prune
from sparse_train.sparse import sparsify
from sparse_train.tasks.batch import collate
from tests.model_types import built
from tests.models import tiny_examples, tiny_model


@pytest.mark.parametrize("family", ["llama", "t5", "whisper"])
def test_a_model_without_data_has_its_computed_buffers(family, tmp_path):
    model, processor = tiny_model(family)
    save_model(tmp_path, model, processor)
    skeleton, _ = open_model(tmp_path)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    for name, buffer in model.named_buffers():
        assert torch.equal(skeleton.get_buffer(name), buffer), name


def _saved(family, folder, change=lambda tensors: None):
    """A model in a folder, and the tensors of the folder changed; (model, one batch)."""
    model, processor = tiny_model(family)
    save_model(folder, model, processor)
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors) or tensors, folder / "model.safetensors", {"format": "pt"})
    return model, collate(tiny_examples(processor), processor)


def _set(folder, file, **facts):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


_READERS = {"load_model": load_model, "runtime": lambda folder: load(folder).model}


def test_a_head_that_is_stored_beside_the_embedding_is_its_own(tmp_path):
    """T5 v1.1 and Flan-T5, whose config says that it is the embedding."""
    model, processor = tiny_model("t5-gated")
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.shared.weight))
    batch = collate(tiny_examples(processor), processor)
    save_model(tmp_path / "dense", model, processor)
    expected = {"dense": model(**batch.inputs()).logits}
    weights = prune(model, [], PruneConfig(method="magnitude", sparsity=0.5))
    expected["sparse"] = model(**batch.inputs()).logits
    save_model(tmp_path / "sparse", sparsify(model, weights), processor)
    for kind, logits in expected.items():
        assert "lm_head.weight" in own_tensors(open_model(tmp_path / kind)[0])
        for name, read in _READERS.items():
            found = read(tmp_path / kind).eval()(**batch.inputs()).logits
            torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("names", [("shared.weight", "lm_head.weight"), ("lm_head.weight",),
                                   ("decoder.embed_tokens.weight",)], ids=str)
def test_a_tied_tensor_may_go_by_any_of_its_names(names, tmp_path):
    model, batch = _saved("t5", tmp_path, lambda tensors: {
        **{name: tensor for name, tensor in tensors.items() if name != "shared.weight"},
        **{name: tensors["shared.weight"].clone() for name in names}})
    again, (skeleton, folder) = load_model(tmp_path), open_model(tmp_path)
    assert again.lm_head.weight is again.shared.weight and skeleton.lm_head.weight is skeleton.shared.weight
    assert all(torch.equal(folder.get(name), tensor) for name, tensor in own_tensors(model).items())
    assert torch.equal(again(**batch.inputs()).logits, model(**batch.inputs()).logits)


@pytest.mark.parametrize("family, left_over", [
    ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"), ("gpt_neox", "gpt_neox.layers.0.attention.bias"),
    ("gpt_neox", "gpt_neox.layers.0.attention.rotary_emb.inv_freq"),
    ("t5", "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight")])
def test_what_published_checkpoints_have_left_over_is_not_minded(family, left_over, tmp_path):
    model, batch = _saved(family, tmp_path, lambda tensors: tensors | {left_over: torch.zeros(4)})
    assert own_tensors(open_model(tmp_path)[0]).keys() == own_tensors(model).keys()
    for read in _READERS.values():
        assert torch.equal(read(tmp_path).eval()(**batch.inputs()).logits, model(**batch.inputs()).logits)


def test_the_name_of_the_model_without_its_head_may_be_left_out(tmp_path):
    model, batch = _saved("opt", tmp_path, lambda tensors: {
        name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    assert torch.equal(load_model(tmp_path)(**batch.inputs()).logits, model(**batch.inputs()).logits)
    _, folder = open_model(tmp_path)
    name = "model.decoder.layers.0.fc1.weight"
    assert torch.equal(folder.get_range(name, 5, 9), model.get_parameter(name).flatten()[5:9])


@pytest.mark.parametrize("read", [load_model, open_model, load])
def test_a_folder_that_does_not_fit_its_config_is_refused_in_one_line(read, tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    for change, told in (
            (lambda tensors: tensors | {"model.extra.weight": torch.zeros(2, 2)},
             "holds 1 tensors that a llama model does not have, such as model.extra.weight"),
            (lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name},
             f"lacks 1 tensors of a llama model, such as {name}"),
            (lambda tensors: tensors | {name: torch.zeros(64, 32)},
             rf"{name} has shape \(64, 32\), but \(128, 32\) in a llama model")):
        _saved("llama", tmp_path, change)
        with pytest.raises(UserError, match=told):
            read(tmp_path)


@pytest.mark.parametrize("read", [load_model, open_model, load])
def test_a_sparse_folder_that_does_not_fit_its_config_is_refused(read, tmp_path):
    model, processor = tiny_model("llama")
    weights = prune(model, [], PruneConfig(method="magnitude", sparsity=0.5))
    model = sparsify(model, weights)
    save_model(tmp_path, model, processor, [*own_tensors(model).items(), ("model.extra.weight", torch.zeros(2))])
    with pytest.raises(UserError, match=r"does not have, such as model\.extra\.weight"):
        read(tmp_path)
    save_model(tmp_path, model, processor)
    _set(tmp_path, "config.json", intermediate_size=64)
    with pytest.raises(UserError, match=r"has shape \(128, 32\), but \(64, 32\)"):
        read(tmp_path)


def test_how_a_model_generates_is_kept_whichever_way_it_is_read(tmp_path):
    model, processor = tiny_model("whisper")
    save_model(tmp_path / "dense", model, processor)
    published = {"suppress_tokens": [1, 2], "begin_suppress_tokens": [5], "lang_to_id": {"<|hi|>": 7},
                 "no_repeat_ngram_size": 3}
    (tmp_path / "dense" / "generation_config.json").write_text(json.dumps(published))
    weights = prune(model, [], PruneConfig(method="magnitude", sparsity=0.5))
    model = load_model(tmp_path / "dense")
    save_model(tmp_path / "sparse", sparsify(model, weights), processor)
    for kind in ("dense", "sparse"):
        skeleton, _ = open_model(tmp_path / kind)
        save_model(tmp_path / "again", load_model(tmp_path / kind), processor)
        assert json.loads((tmp_path / "again" / "generation_config.json").read_text()).items() >= published.items()
        for again in (skeleton, *(read(tmp_path / kind) for read in _READERS.values())):
            assert {name: getattr(again.generation_config, name) for name in published} == published


@pytest.mark.parametrize("where", ["folder", "hub"])
def test_pickled_weights_are_refused_with_what_to_do(where, tmp_path, monkeypatch):
    model, processor = tiny_model("llama")
    save_model(tmp_path, model, processor)
    (tmp_path / "model.safetensors").unlink()
    path = tmp_path
    if where == "hub":
        path = "owner/name"
        monkeypatch.setattr("sparse_train.models.checkpoint.snapshot_download", lambda name, **_: str(tmp_path))
    else:
        torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    for read in (load_model, open_model, load):
        with pytest.raises(UserError, match=f"{path} has no weights in safetensors; pickled ones.*convert them"):
            read(path)


@pytest.mark.parametrize("facts, told", [
    ({"attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 2}}, "attn_type=grouped_query_attention"),
    ({"attn_config": {"attn_type": "multiquery_attention"}}, "attn_type=multiquery_attention is not supported"),
    ({"attn_config": {"qk_ln": True}}, "qk_ln=True is not supported"),
    ({"attn_config": {"alibi": False}}, "alibi=False is not supported"),
    ({"logit_scale": "inv_sqrt_d_model"}, "logit_scale=inv_sqrt_d_model is not supported"),
    ({"n_heads": "four"}, "model config of .* is not valid: .*n_heads"),
], ids=str)
def test_an_mpt_that_transformers_would_compute_otherwise_is_refused(facts, told, tmp_path):
    _saved("mpt", tmp_path)
    load_model(tmp_path)
    _set(tmp_path, "config.json", **facts)
    for read in (load_model, open_model):
        with pytest.raises(UserError, match=told) as error:
            read(tmp_path)
        assert "\n" not in str(error.value)


def _theirs(model, folder):
    """As save_pretrained writes it, which is not always under the model's own names."""
    model.save_pretrained(folder)
    return folder


def test_what_is_neither_on_meta_nor_stored_is_read_or_computed(tmp_path):
    """DiffLlama makes parameters outside the meta device; Falcon-H1's mup_vector is in no checkpoint."""
    for model_type in ("diffllama", "falcon_h1"):
        model = built(model_type)
        folder = _theirs(model, tmp_path / model_type)
        theirs, ours = type(model).from_pretrained(folder), load_model(folder)
        for kind in ("named_parameters", "named_buffers"):
            wanted = dict(getattr(theirs, kind)())
            for name, tensor in getattr(ours, kind)():
                assert torch.equal(tensor, wanted[name]), name


def test_a_buffer_that_nothing_computes_is_refused_by_name(tmp_path, monkeypatch):
    model = built("falcon_h1")
    folder = _theirs(model, tmp_path)
    computes = next(kind for kind in type(model).__mro__ if "_init_weights" in vars(kind))
    monkeypatch.setattr(computes, "_init_weights", lambda self, module: None)
    with pytest.raises(UserError, match=r"^model\.\S+ of a falcon_h1 model is not stored in checkpoints"):
        load_model(folder)


def test_ranges_are_those_of_the_model_whatever_the_file_calls_them(tmp_path):
    for model_type in ("gpt_neox", "qwen3_moe"):  # renamed; experts put together
        model = built(model_type)
        _, folder = open_model(_theirs(model, tmp_path / model_type))
        for name, tensor in own_tensors(model).items():
            assert torch.equal(folder.get(name), tensor), name
            assert torch.equal(folder.get_range(name, 3, 11), tensor.flatten()[3:11]), name


def test_an_expert_that_is_missing_is_found_from_names_alone(tmp_path):
    model = built("qwen3_moe")
    tensors = load_file(_theirs(model, tmp_path) / "model.safetensors")
    name = next(name for name in tensors if ".experts.2.up_proj" in name)
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"do not make up model\.layers\.\d\.mlp\.experts\.gate_up_proj of a qwen3_moe"):
        open_model(tmp_path)


@pytest.mark.parametrize("facts, told", [
    ({"quantization_config": {"quant_method": "fp8"}}, r"is quantised \(fp8\)"),
    ({"quantization_config": {"quant_method": "sparse-train", "version": 2}}, "version 2 .*update sparse-train"),
    ({"model_type": "chatglm", "auto_map": {"AutoConfig": "configuration_x.XConfig"}},
     "code of its own, and the code of a model folder is never run$"),
    ({"hidden_size": -4}, "cannot|no model"),
], ids=str)
def test_a_config_that_is_not_supported_is_refused_in_one_line(facts, told, tmp_path, monkeypatch):
    _saved("llama", tmp_path)
    (tmp_path / "configuration_x.py").write_text("raise SystemExit('executed')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    _set(tmp_path, "config.json", **facts)
    with pytest.raises(UserError, match=told) as error:
        open_model(tmp_path)
    assert "\n" not in str(error.value) and "trust_remote_code" not in str(error.value)


def test_codes_without_a_config_that_says_so_are_named_quantised(tmp_path):
    _saved("llama", tmp_path, lambda tensors: {
        name: tensor.to(torch.int8) if "q_proj" in name else tensor for name, tensor in tensors.items()})
    with pytest.raises(UserError, match=r"q_proj\.weight is stored as I8, so the checkpoint is quantised"):
        open_model(tmp_path)


@pytest.mark.parametrize("choice", ["flash_attention_2", "owner/repo", "paged|sdpa"])
def test_a_folder_does_not_choose_what_computes_attention(choice, tmp_path):
    model, batch = _saved("llama", tmp_path)
    _set(tmp_path, "config.json", attn_implementation=choice, experts_implementation=choice)
    assert torch.equal(load_model(tmp_path)(**batch.inputs()).logits, model(**batch.inputs()).logits)


def test_a_tokenizer_that_needs_code_of_its_own_is_refused(tmp_path, monkeypatch):
    _saved("llama", tmp_path)
    (tmp_path / "tokenization_x.py").write_text("raise SystemExit('executed')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    _set(tmp_path, "tokenizer_config.json", tokenizer_class="X", auto_map={"AutoTokenizer": ["tokenization_x.X", None]})
    with pytest.raises(UserError, match="code of its own, and the code of a model folder is never run"):
        load_processor(tmp_path)


def test_a_stale_index_is_not_believed(tmp_path):
    """As from_pretrained chooses: the single file, where there is one."""
    model, processor = tiny_model("llama")
    save_model(tmp_path, model, processor)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": dict.fromkeys(own_tensors(model), "model-00001-of-00002.safetensors")}))
    again = load_model(tmp_path)
    assert all(torch.equal(again.get_parameter(name), tensor) for name, tensor in model.named_parameters())


@pytest.mark.parametrize("path, told", [
    ("./nope", r"there is no folder \./nope"), ("/no/such/folder", "there is no folder /no/such/folder"),
    ("a/b/c", "there is no folder a/b/c"), ("~/models", "there is no folder ~/models"),
    ("owner/model.Q4.gguf", r"there is no file owner/model\.Q4\.gguf"),
])
def test_a_path_that_is_not_there_is_called_a_path(path, told):
    for read in (read_config, load_model, load_processor):
        with pytest.raises(UserError, match=told) as error:
            read(path)
        assert "\n" not in str(error.value)


def test_save_pretrained_of_a_sparse_model_writes_our_format(tmp_path):
    """As the Trainer calls it; of a dense model of the same class it is what it was."""
    model, processor = tiny_model("t5")
    model.save_pretrained(tmp_path / "dense")
    model = sparsify(model, prune(model, [], PruneConfig(method="magnitude", sparsity=0.5)))
    torch.save(model, tmp_path / "whole.pt")
    ways = {"trainer": model, "copy": copy.deepcopy(model),
            "pickle": torch.load(tmp_path / "whole.pt", weights_only=False)}
    for name, each in ways.items():
        each.save_pretrained(str(tmp_path / name), state_dict=each.state_dict() if name == "trainer" else None,
                             is_main_process=True)
        processor.save_pretrained(tmp_path / name)
        assert {path.name for path in (tmp_path / name).glob("*.safetensors")} == {"sparse.safetensors"}
        again = load_model(tmp_path / name)
        assert again.generation_config.to_dict() == model.generation_config.to_dict()
        assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in model.state_dict().items())
        assert type(model).from_pretrained(tmp_path / name).is_quantized
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    assert not (tmp_path / "none").exists()
    with pytest.raises(UserError, match="save it, then upload"):
        model.save_pretrained(tmp_path / "none", push_to_hub=True)
    assert type(model).from_pretrained(tmp_path / "dense").config.d_model == model.config.d_model
