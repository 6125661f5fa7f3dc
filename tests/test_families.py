"""Every family: what is pruned, the calibration walk, the loader, and the losses over one and two stacks."""

import logging

import pytest
import torch
from transformers import GPT2Config, PhiConfig

from sparse_train.config import LossConfig, ModelConfig, PruneConfig
from sparse_train.errors import UserError
from sparse_train.models import (
    build_model,
    build_processor,
    family_of,
    load_model,
    load_processor,
    open_model,
    save_model,
)
from sparse_train.models.checkpoint import from_config
from sparse_train.pruning import prune
from sparse_train.sparse import sparsify
from sparse_train.tasks import Example
from sparse_train.tasks.batch import collate
from sparse_train.training.features import Tap
from tests.models import tiny_tokenizer

# Weights pruned in one block of each stack.
_NUM_PRUNABLE = {"mpt": [4], "t5": [6, 10], "t5-gated": [7, 11], "whisper": [6, 10], "llama": [7], "mistral": [7],
                 "qwen3": [7], "olmo2": [7], "gpt_neox": [4], "opt": [6]}


def _made(family, **more):
    torch.manual_seed(0)
    config = ModelConfig(family=family, d_model=32, n_layers=2, n_heads=4, max_seq_len=64, window_seconds=0.4, **more)
    processor = build_processor(config, tiny_tokenizer())
    return build_model(config, processor).eval(), processor


def _examples(processor):
    import numpy as np
    draw = np.random.default_rng(0)
    found = []
    for index, text in enumerate(("one two", "three", "four five six seven", "8")):
        sound = draw.standard_normal(1600 + 800 * index).astype(np.float32)
        found.append(Example(f"Say {text}", f" {text} 1 2", (lambda rate, s=sound: s) if processor.features else None))
    return found


@pytest.mark.parametrize("family", _NUM_PRUNABLE)
def test_a_family_prunes_its_blocks_and_nothing_else(family):
    model, _ = _made(family)
    found, linears = family_of(model), family_of(model).prunable_linears(model)
    per_block = [sum(name.startswith(f"{stack.blocks}.0.") for name in linears) for stack in found.stacks]
    assert per_block == _NUM_PRUNABLE[family]
    inside = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
              and any(name.startswith(f"{stack.blocks}.") for stack in found.stacks)}
    assert inside == set(linears)


@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
@pytest.mark.parametrize("family", _NUM_PRUNABLE)
def test_every_family_is_pruned_saved_and_read(family, method, tmp_path):
    model, processor = _made(family)
    batches = [collate(_examples(processor)[:3], processor), collate(_examples(processor)[3:], processor)]
    weights = prune(model, batches, PruneConfig(method=method, sparsity=0.5))
    for name, weight in weights.items():
        assert weight.sparsity == pytest.approx(0.5, abs=1e-3), name
    dense_logits = model(**batches[0].inputs()).logits
    save_model(tmp_path, sparsify(model, weights), processor)
    again = load_model(tmp_path).eval()
    torch.testing.assert_close(again(**batches[0].inputs()).logits, dense_logits, rtol=1e-4, atol=1e-5)
    read = load_processor(tmp_path)
    assert read.decoder_prefix == processor.decoder_prefix
    other = collate(_examples(processor)[:3], read)
    for key, value in batches[0].inputs().items():
        assert torch.equal(other.inputs()[key], value)


@pytest.mark.parametrize("family", ["t5", "whisper", "mpt"])
def test_calibration_sees_what_a_forward_pass_of_the_pruned_model_shows(family):
    """The Hessians' inputs: nothing of padding, cross-attention's from the encoder; in a model that prunes nothing."""
    from sparse_train.pruning import blockwise

    model, processor = _made(family)
    batch = collate(_examples(processor), processor)
    linears, seen, wanted = family_of(model).prunable_linears(model), {}, {}

    class Spy(blockwise.Hessian):
        def mean(self):
            seen[len(seen)] = self.sum.clone()
            return super().mean()

    handles = []
    for name, linear in linears.items():
        cross = any(part in name for part in ("EncDecAttention.k", "EncDecAttention.v", "encoder_attn.k_proj",
                                              "encoder_attn.v_proj"))
        side = "encoder" if cross or name.startswith(("encoder", "model.encoder")) else "decoder"

        def hook(module, args, name=name, side=side):
            real = args[0][batch.attends[side]]
            wanted[name] = 2 * real.T @ real
        handles.append(linear.register_forward_pre_hook(hook))
    with torch.no_grad():
        model(**batch.inputs())
    for handle in handles:
        handle.remove()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blockwise, "Hessian", Spy)
        prune(model, [batch], PruneConfig(method="sparsegpt", sparsity=0.0))
    assert len(seen) == len(linears)
    for found, name in zip(seen.values(), linears, strict=True):
        torch.testing.assert_close(found, wanted[name], rtol=1e-3, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("family", ["t5", "whisper"])
def test_features_of_both_stacks_have_their_own_padding(family):
    model, processor = _made(family)
    points = family_of(model).feature_points(model)
    assert [(point.side, point.block) for point in points] == [
        ("encoder", 0), ("encoder", 1), ("decoder", 0), ("decoder", 1)]
    batch, shapes = collate(_examples(processor), processor), {}
    with Tap([point.module for point in points], lambda i, x: shapes.__setitem__(i, x.shape[:2])), torch.no_grad():
        model(**batch.inputs())
    for index, point in enumerate(points):
        assert shapes[index] == batch.attends[point.side].shape


def test_whispers_preset_takes_blocks_0_to_9_and_the_padding():
    loss = LossConfig(preset="paper-whisper")
    assert loss.layers == tuple(range(10)) and loss.encoder_padding


@pytest.mark.parametrize("config", [GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50),
                                    PhiConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                              intermediate_size=64, vocab_size=50)], ids=["gpt2", "phi"])
def test_an_unknown_family_is_derived_and_said_or_refused(config, caplog):
    model = from_config(config)
    if config.model_type == "gpt2":  # its projections are convolutions
        with pytest.raises(UserError, match=r"gpt2.*cannot be derived"):
            family_of(model)
        return
    with caplog.at_level(logging.WARNING):
        found = family_of(model)
    assert found.stacks[0].blocks == "model.layers" and "fc1" in found.prunable
    assert "model.layers" in caplog.text


@pytest.mark.parametrize("family", ["llama", "t5", "whisper"])
def test_a_model_without_data_has_its_computed_buffers(family, tmp_path):
    model, processor = _made(family)
    save_model(tmp_path, model, processor)
    skeleton, _ = open_model(tmp_path)
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    for name, buffer in model.named_buffers():
        assert torch.equal(skeleton.get_buffer(name), buffer), name


def test_a_weight_that_is_not_the_models_is_refused(tmp_path):
    model, processor = _made("llama")
    model.model.extra = torch.nn.Linear(2, 2)
    save_model(tmp_path, model, processor)
    with pytest.raises(UserError, match=r"does not have, such as model\.extra"):
        load_model(tmp_path)
