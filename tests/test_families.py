"""Every family: what is pruned, the calibration walk, features over one and two stacks; and families not known."""

import logging
from importlib.metadata import EntryPoint

import pytest
import torch
from transformers import (
    BartConfig,
    GPT2Config,
    MambaConfig,
    MarianConfig,
    MixtralConfig,
    OPTConfig,
    PhiConfig,
    ProphetNetConfig,
)

from sparse_train.config import LossConfig, ModelConfig, PruneConfig
from sparse_train.errors import UserError
from sparse_train.models import (
    Family,
    Stack,
    family_of,
    family_of_type,
    load_model,
    load_processor,
    save_model,
)
from sparse_train.models.empty import from_config
from sparse_train.models.families import inferred, registered_family
from sparse_train.models.family import block_output, decoder_sizes
from sparse_train.pruning import prune
from sparse_train.pruning.sparsegpt import SparseGPT
from sparse_train.registry import FAMILIES, PRUNERS, TASKS, FamilyEntry, Registry
from sparse_train.sparse import sparsify
from sparse_train.tasks.batch import Batch, EncoderInput, collate
from sparse_train.training.features import Tap
from tests.models import tiny_examples, tiny_model

# Weights pruned in one block of each stack.
_NUM_PRUNABLE = {"mpt": [4], "t5": [6, 10], "t5-gated": [7, 11], "whisper": [6, 10], "llama": [7], "mistral": [7],
                 "qwen3": [7], "olmo2": [7], "gpt_neox": [4], "opt": [6]}


def test_the_table_and_the_families_agree():
    assert FAMILIES.entries.keys() == _NUM_PRUNABLE.keys()
    for name, entry in FAMILIES.entries.items():
        family, config = FAMILIES.load(name)(), tiny_model(name)[0].config
        assert family.takes_audio == (entry.audio_step_s is not None)
        assert type(family_of_type(config.model_type)) in type(family).__mro__  # a variant is a subclass
        assert TASKS.load(entry.task).takes_audio == family.takes_audio
        if entry.has_kv_heads:
            assert tiny_model(name, n_kv_heads=2)[0].config.num_key_value_heads == 2
        if entry.has_ffn_width:
            assert tiny_model(name, d_ff=48)[0].num_parameters() < tiny_model(name)[0].num_parameters()


@pytest.mark.parametrize("family", _NUM_PRUNABLE)
def test_a_family_prunes_its_blocks_and_nothing_else(family):
    model, _ = tiny_model(family)
    stacks, linears = family_of(model).stacks, family_of(model).prunable_linears(model)
    per_block = [sum(name.startswith(f"{stack.blocks}.0.") for name in linears) for stack in stacks]
    assert per_block == _NUM_PRUNABLE[family]
    inside = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
              and any(name.startswith(f"{stack.blocks}.") for stack in stacks)}
    assert inside == set(linears)


@pytest.mark.parametrize("method", PRUNERS.entries)
@pytest.mark.parametrize("family", _NUM_PRUNABLE)
def test_every_family_is_pruned_saved_and_read(family, method, tmp_path):
    model, processor = tiny_model(family)
    batches = [collate(tiny_examples(processor)[:3], processor), collate(tiny_examples(processor)[3:], processor)]
    options = {"iterations": 2} if method in ("admm", "alps") else {}  # the default would take half a minute in all
    spec = PruneConfig(method=method, sparsity=0.5, options=options)
    if method == "obert" and len(family_of(model).stacks) > 1:
        with pytest.raises(UserError, match=r"needs a decoder-only model, and this (t5|whisper) model has an encoder"):
            prune(model, batches, spec)
        return
    weights = prune(model, batches, spec)
    for name, weight in weights.items():
        assert weight.sparsity == pytest.approx(0.5, abs=1e-3), name
    dense_logits = model(**batches[0].inputs()).logits
    save_model(tmp_path, sparsify(model, weights), processor)
    again = load_model(tmp_path).eval()
    torch.testing.assert_close(again(**batches[0].inputs()).logits, dense_logits, rtol=1e-4, atol=1e-5)
    read = load_processor(tmp_path)
    assert read.decoder_prefix == processor.decoder_prefix
    other = collate(tiny_examples(processor)[:3], read)
    for key, value in batches[0].inputs().items():
        assert torch.equal(other.inputs()[key], value)


def _calibrated(model, batch, sparsity):
    """Linear's name -> the sum that `prune` made of its inputs."""
    sums, prune_layer = {}, SparseGPT.prune

    def spy(pruner, layer, statistics):
        sums[layer.name] = statistics.mean() * statistics.num_tokens
        return prune_layer(pruner, layer, statistics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SparseGPT, "prune", spy)
        prune(model, [batch], PruneConfig(method="sparsegpt", sparsity=sparsity))
    return sums


def _is_cross(name):
    return any(part in name for part in ("EncDecAttention.k", "EncDecAttention.v", "encoder_attn.k_proj",
                                         "encoder_attn.v_proj"))


def _of_a_forward_pass(model, batch):
    """The same sums from the inputs in one forward pass of `model`."""
    sums, handles = {}, []
    for name, linear in family_of(model).prunable_linears(model).items():
        side = "encoder" if _is_cross(name) or name.startswith(("encoder", "model.encoder")) else "decoder"

        def hook(module, args, name=name, side=side):
            real = args[0].view(*batch.attends[side].shape, -1)[batch.attends[side]]
            sums[name] = 2 * real.T @ real
        handles.append(linear.register_forward_pre_hook(hook))
    with torch.no_grad():
        model(**batch.inputs())
    for handle in handles:
        handle.remove()
    return sums


def _agree(sums, expected, names):
    assert names
    for name in names:
        torch.testing.assert_close(sums[name], expected[name], rtol=1e-3, atol=1e-3,
                                   msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("family", ["t5", "whisper", "mpt", "gpt_neox", "opt", "llama", "olmo2"])
def test_calibration_sees_what_a_forward_pass_of_the_pruned_model_shows(family):
    """The Hessians' inputs: nothing of padding, cross-attention's from the encoder; in a model that prunes nothing."""
    model, processor = tiny_model(family)
    batch = collate(tiny_examples(processor), processor)
    expected = _of_a_forward_pass(model, batch)
    _agree(_calibrated(model, batch, 0.0), expected, list(expected))


@pytest.mark.parametrize("family", ["t5", "whisper"])
def test_calibration_of_the_decoder_sees_the_pruned_encoder(family):
    (model, processor), (after, _) = tiny_model(family), tiny_model(family)
    for parameter in [*model.parameters(), *after.parameters()]:
        if parameter.ndim > 1:
            parameter.data.mul_(4)  # a new Whisper's blocks add so little that pruning them would not show
    batch = collate(tiny_examples(processor), processor)
    dense = _of_a_forward_pass(model, batch)
    sums = _calibrated(model, batch, 0.5)
    encoder, decoder = (stack.blocks for stack in family_of(model).stacks)
    # The dense model with the pruned encoder: what the decoder's first block meets before it is pruned itself.
    after.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name.startswith(encoder)},
                          strict=False)
    expected = _of_a_forward_pass(after, batch)
    first = [name for name in sums if name.startswith(f"{decoder}.0.")]
    _agree(sums, expected, first + [name for name in sums if _is_cross(name)])
    assert all((expected[name] - dense[name]).norm() > 0.01 * dense[name].norm() for name in first if _is_cross(name))


@pytest.mark.parametrize("family", ["t5", "whisper"])
def test_features_of_both_stacks_have_their_own_padding(family):
    model, processor = tiny_model(family)
    points = family_of(model).feature_points(model)
    assert [(point.side, point.block) for point in points] == [
        ("encoder", 0), ("encoder", 1), ("decoder", 0), ("decoder", 1)]
    batch, shapes = collate(tiny_examples(processor), processor), {}
    tap = Tap([point.module for point in points])
    with tap.visiting(lambda index, x: shapes.__setitem__(index, x.shape[:2])), torch.no_grad():
        model(**batch.inputs())
    for index, point in enumerate(points):
        assert shapes[index] == batch.attends[point.side].shape


@pytest.mark.parametrize("family", [name for name in FAMILIES.entries if name != "olmo2"])
def test_norms_as_features_read_what_the_blocks_put_out(family):
    model, processor = tiny_model(family)
    seen = {"blocks": [], "norms": []}
    for point in family_of(model).feature_points(model):
        point.module.register_forward_hook(lambda m, i, o: seen["blocks"].append(block_output(o)))
    for point in family_of(model).feature_points(model, "norms"):
        point.module.register_forward_hook(lambda m, i, o: seen["norms"].append((i[0], o)))
    model(**collate(tiny_examples(processor), processor).inputs(), use_cache=False)
    assert len(seen["blocks"]) == len(seen["norms"])
    for block, (read, normed) in zip(seen["blocks"], seen["norms"], strict=True):
        assert torch.equal(read, block) and normed.shape == block.shape and not torch.equal(normed, block)


def test_whispers_preset_takes_blocks_0_to_9_and_the_padding():
    loss = LossConfig(preset="paper-whisper")
    assert loss.layers == tuple(range(10)) and loss.encoder_padding


_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
          "vocab_size": 50, "pad_token_id": 0}
_TWO_STACKS = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
               "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 50,
               "pad_token_id": 0, "decoder_start_token_id": 0}


@pytest.mark.parametrize("config, blocks, norm, share", [
    (PhiConfig(**_SMALL), "model.layers", "model.final_layernorm", 97),
    # Its experts are one tensor, and no linears.
    (MixtralConfig(**_SMALL, num_key_value_heads=2, num_local_experts=4), "model.layers", "model.norm", 11),
    (BartConfig(**_TWO_STACKS), "model.encoder.layers", None, 96),
    (MarianConfig(**_TWO_STACKS), "model.encoder.layers", None, 96),
], ids=lambda value: getattr(value, "model_type", ""))
def test_an_unknown_family_is_inferred_and_logged(config, blocks, norm, share, caplog, monkeypatch):
    monkeypatch.setattr(inferred, "_inferred", {})
    torch.manual_seed(0)
    model = from_config(config).eval()
    with caplog.at_level(logging.WARNING):
        family = family_of(model)
    assert (family.stacks[0].blocks, family.stacks[0].final_norm) == (blocks, norm)
    assert blocks in caplog.text and f", {share}% of the blocks' parameters" in caplog.text
    assert len(family.feature_points(model)) == 2 * len(family.stacks)
    if norm is None:
        with pytest.raises(UserError, match=f"{config.model_type} model has no norm behind {blocks}; use"):
            family.feature_points(model, "final_norm")
    if not config.is_encoder_decoder:
        assert [point.module for point in family.feature_points(model, "norms")] == [
            model.get_submodule(f"{blocks}.1.input_layernorm"), model.get_submodule(norm)]
    ids = torch.randint(3, 50, (2, 6))
    attend = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    batch = Batch(ids, attend, ids, EncoderInput(ids, attend) if config.is_encoder_decoder else None)
    weights = prune(model, [batch], PruneConfig(sparsity=0.5))
    pruned = model(**batch.inputs()).logits
    torch.testing.assert_close(sparsify(model, weights)(**batch.inputs()).logits, pruned)


@pytest.mark.parametrize("config, reason", [
    # Its projections are convolutions.
    (GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50), "cannot be derived"),
    (MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=50), "outside of them"),
    (ProphetNetConfig(hidden_size=32, num_encoder_layers=2, num_decoder_layers=2, num_encoder_attention_heads=4,
                      num_decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=50),
     "several states per token"),
], ids=lambda value: getattr(value, "model_type", ""))
def test_an_unknown_family_that_cannot_be_pruned_is_refused(config, reason):
    with pytest.raises(UserError, match=f"{config.model_type}.*{reason}.*supported are mpt"):
        family_of(from_config(config))


class Phi(Family):
    stacks = (Stack("model.layers", "model.final_layernorm"),)
    prunable = ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2")

    def new_config(self, size, tokens):
        return PhiConfig(**decoder_sizes(size), **tokens)


@pytest.fixture
def phi_of_another_package(monkeypatch):
    point = EntryPoint("phi", f"{__name__}:Phi", FAMILIES.group)
    monkeypatch.setattr("sparse_train.registry.entry_points", lambda group: [point] if group == FAMILIES.group else [])
    registry = Registry("family", FAMILIES.group, FamilyEntry, FAMILIES.entries)
    monkeypatch.setitem(vars(FAMILIES), "entries", registry.entries)
    registered_family.cache_clear()
    yield
    registered_family.cache_clear()


def test_another_package_adds_a_family(phi_of_another_package, caplog):
    model, processor = tiny_model("phi")
    with caplog.at_level(logging.WARNING):
        assert isinstance(family_of(model), Phi)
    assert not caplog.text
    weights = prune(model, [collate(tiny_examples(processor), processor)], PruneConfig(sparsity=0.5))
    assert len(weights) == 2 * len(Phi.prunable)


def test_a_family_that_is_not_in_the_table_is_refused_with_the_names():
    with pytest.raises(ValueError, match="there is no family phi; choose from: mpt, t5"):
        ModelConfig(family="phi")


def test_norms_that_a_model_of_the_table_lacks_are_said():
    model = from_config(OPTConfig(hidden_size=32, word_embed_proj_dim=16, num_hidden_layers=2, num_attention_heads=4,
                                  ffn_dim=64, do_layer_norm_before=False, vocab_size=50))
    assert len(family_of(model).feature_points(model)) == 2
    with pytest.raises(UserError, match=r"this opt model has no norm behind model\.decoder\.layers"):
        family_of(model).feature_points(model, "final_norm")
    olmo, _ = tiny_model("olmo2")
    with pytest.raises(UserError, match=r"this olmo2 model has no norm at the start of each block of model\.layers"):
        family_of(olmo).feature_points(olmo, "norms")


@pytest.mark.parametrize("size, message", [
    ({"family": "mpt", "n_kv_heads": 2}, "n_kv_heads=2: mpt has as many heads of keys as n_heads=4"),
    ({"family": "t5", "n_kv_heads": 2}, "n_kv_heads=2: t5 has as many"),
    ({"family": "llama", "n_kv_heads": 3}, "n_kv_heads=3 must divide n_heads=4"),
    ({"family": "whisper", "window_seconds": 0.05}, "window_seconds=0.05: .* give a multiple, such as 0.04"),
    ({"family": "whisper", "window_seconds": 0.001}, "such as 0.02"),
])
def test_a_size_that_no_model_has_is_refused(size, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**size)
    assert ModelConfig(family="llama", n_kv_heads=2).n_kv_heads == 2
    assert ModelConfig(family="whisper", window_seconds=0.58).window_seconds == 0.58
