"""Private interfaces of other libraries still do what sparse_train/compat uses them for."""

import shutil
import time

import psutil
import pytest
import submitit
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    MarianConfig,
    MixtralConfig,
    MptConfig,
    ViTConfig,
)

from sparse_train.compat import submitit as submitit_compat
from sparse_train.compat import transformers as compat
from sparse_train.models.empty import from_config
from tests.model_types import built
from tests.models import tiny_mpt

_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
          "vocab_size": 50, "pad_token_id": 0}


def _llama():
    return from_config(LlamaConfig(**_SMALL))


def test_transformers_is_the_release_that_compat_names():
    assert f"transformers {transformers.__version__}." in compat.__doc__


def test_a_config_has_a_model_or_not():
    assert compat.has_model(AutoModelForCausalLM, LlamaConfig())
    assert not compat.has_model(AutoModelForCausalLM, ViTConfig())


def test_a_config_does_not_choose_a_kernel():
    config = LlamaConfig(**_SMALL, attn_implementation="flash_attention_2")
    assert config._attn_implementation == "flash_attention_2"
    compat.reset_implementations(config)
    assert AutoModelForCausalLM.from_config(config).config._attn_implementation == "sdpa"


def test_attention_that_can_be_replaced_says_so():
    assert compat.supports_attention_interface(_llama()) and not compat.supports_attention_interface(tiny_mpt())


def test_from_pretrained_reads_the_named_file_and_passes_over_modules(tmp_path):
    model = _llama()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    config = LlamaConfig.from_pretrained(tmp_path)
    compat.name_weights(config, "other.safetensors")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, config=config)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    unexpected = {"model.layers.1.mlp.up.values", "model.layers.10.mlp.up.values"}
    compat.ignore_unexpected(again, ["model.layers.1"])
    assert compat.drop_expected(again, (), unexpected)[1] == ["model.layers.10.mlp.up.values"]


def test_models_with_a_cache_of_their_own_are_known():
    kinds = ("llama", "mpt", "mamba", "minimax", "openai-gpt", "xlnet")
    assert [kind for kind in kinds if compat.has_usual_cache(built(kind))] == ["llama", "mpt"]


def test_only_new_tensors_are_initialised():
    model = _llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    compat.mark_initialised(model)
    model.model.norm.weight = torch.nn.Parameter(torch.zeros(32))
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(50, 32))
    compat.initialise_unmarked(model)
    assert (model.model.norm.weight == 1).all() and model.lm_head.weight.std() > 0
    others = {name: p for name, p in model.named_parameters() if name not in ("model.norm.weight", "lm_head.weight")}
    assert all((parameter == 7).all() for parameter in others.values())


def test_names_that_from_pretrained_passes_over_are_dropped():
    names = compat.drop_expected(_llama(), ["b", "a"], ["z", "model.layers.0.self_attn.rotary_emb.inv_freq"])
    assert names == (["a", "b"], ["z"])


def test_tables_that_are_computed_are_not_saved():
    marian = from_config(MarianConfig(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
                                      decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=50,
                                      pad_token_id=0, decoder_start_token_id=0))
    assert "model.encoder.embed_positions.weight" in compat.names_not_saved(marian)
    assert compat.names_not_saved(_llama()) == set()


def test_names_are_converted_both_ways():
    model = from_config(GPTNeoXConfig(**_SMALL))
    loading, saving, expected = compat.loading_conversions(model), compat.saving_conversions(model), model.state_dict()
    prefix = model.base_model_prefix
    assert loading.load_name("embed_out.weight", prefix, expected) == ("lm_head.weight", None)
    assert loading.load_name("layers.0.mlp.dense_h_to_4h.bias", prefix, expected)[0] == (
        "gpt_neox.layers.0.mlp.dense_h_to_4h.bias")
    assert saving.save_name("lm_head.weight") == "embed_out.weight"
    assert compat.Conversions().load_name("lm_head.weight", prefix, expected) == ("lm_head.weight", None)


def test_experts_are_fused_and_taken_apart():
    model = from_config(MixtralConfig(**_SMALL, num_key_value_heads=2, num_local_experts=2))
    parameters = model.state_dict()
    loading, saving = compat.loading_conversions(model), compat.saving_conversions(model)
    stored = [f"model.layers.0.block_sparse_moe.experts.{expert}.w2.weight" for expert in range(2)]
    names = {loading.load_name(name, model.base_model_prefix, parameters) for name in stored}
    (group, pattern), = names
    weights = [torch.randn(32, 64) for _ in stored]
    fused = compat.convert(loading.converter(pattern), group, {pattern: weights}, model.config, parameters)
    fused_weight = fused[group]
    assert fused.keys() == {group} and torch.equal(fused_weight, torch.stack(weights))
    group, pattern = saving.group(group)
    apart = compat.convert(saving.converter(pattern), group, {pattern: [fused_weight]}, model.config, parameters)
    assert {saving.save_name(name) for name in apart} == set(stored)
    assert all(torch.equal(*pair) for pair in zip(apart.values(), weights, strict=True))


def test_layers_are_in_their_natural_order():
    assert sorted(["a.10.x", "a.2.x"], key=compat.natural_order) == ["a.2.x", "a.10.x"]


@pytest.mark.parametrize("has_file", [True, False])
def test_a_folder_without_generation_config_generates_as_its_config_says(has_file, tmp_path):
    MptConfig(eos_token_id=5).save_pretrained(tmp_path)
    if has_file:
        transformers.GenerationConfig(eos_token_id=6).save_pretrained(tmp_path)
    assert compat.load_generation_config(tmp_path).eos_token_id == (6 if has_file else 5)


def test_gguf_tokenizers_that_split_text_in_other_ways_are_known():
    assert {"llama-bpe", "qwen2"} <= compat.gguf_text_splits().keys()
    assert not {"gpt-2", "smollm"} & compat.gguf_text_splits().keys()  # sparse_train/models/gguf.py knows these


def test_submitit_is_the_release_that_compat_names():
    assert f"submitit {submitit.__version__}." in submitit_compat.__doc__


def test_the_process_of_a_local_job_can_be_watched_and_ended(tmp_path):
    executor = submitit.LocalExecutor(tmp_path)
    executor.update_parameters(timeout_min=1)
    process = submitit_compat.local_process(executor.submit(time.sleep, 60))
    assert process.poll() is None and psutil.pid_exists(process.pid)
    process.kill()
    assert process.wait(20) != 0


@pytest.mark.parametrize("num_jobs, array", [(1, False), (3, True)])
def test_a_batch_file_is_known_before_it_is_submitted(num_jobs, array, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")  # submitit refuses a machine without srun
    executor = submitit.SlurmExecutor(tmp_path)
    executor.update_parameters(job_name="a name", time=30)
    text = submitit_compat.batch_text(executor, num_jobs)
    assert text.startswith("#!/bin/bash") and "#SBATCH --time=30" in text and "submitit.core._submit" in text
    assert ("#SBATCH --array=0-2" in text) == array
