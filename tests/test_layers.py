"""Which linears are pruned and how far: targets, ignore, sparsities per layer; the others stay dense to the end."""

import copy

import pytest
import torch
from torch import nn

from sparse_train.compress import export_dense, export_sparse, unpruned_zeros
from sparse_train.config import PruneConfig, RunConfig, Section
from sparse_train.errors import UserError
from sparse_train.inference import PackedLinear, load
from sparse_train.launch.submit.validate import summarise, validate
from sparse_train.models import family_of, load_model, save_model
from sparse_train.pruning import Pruner, build_pruner, prune
from sparse_train.pruning.layers import choose_layers
from sparse_train.pruning.parameters import count_parameters
from sparse_train.registry import PRUNERS, PrunerEntry
from sparse_train.sparse import SparseLinear, sparse_linears, sparsify
from tests.models import tiny_mpt, tiny_tokenizer

SHAPES = {f"blocks.{block}.{name}": (8, width) for block in range(2)
          for name, width in (("attn.q", 8), ("attn.o", 8), ("ffn.up", 8), ("ffn.down", 10))}


def _chosen(**keys):
    (level,) = PruneConfig(**keys).levels
    return {name: layer.sparsity for name, layer in choose_layers(SHAPES, level).items()}


@pytest.mark.parametrize("keys, expected", [
    ({}, set(SHAPES)),
    ({"targets": ("*.attn.*",)}, {name for name in SHAPES if "attn" in name}),
    ({"ignore": ("*.down", "blocks.0.*")}, {"blocks.1.attn.q", "blocks.1.attn.o", "blocks.1.ffn.up"}),
    ({"targets": ("*.ffn.*", "*.q"), "ignore": ("blocks.?.ffn.up",)},
     {f"blocks.{block}.{name}" for block in (0, 1) for name in ("ffn.down", "attn.q")}),
])
def test_targets_are_pruned_but_for_those_to_ignore(keys, expected):
    assert _chosen(sparsity=0.5, **keys) == dict.fromkeys(expected, 0.5)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_longest_pattern_that_matches_decides_the_sparsity_in_any_order(reverse):
    items = [("*.ffn.*", 0.25), ("*.down", 0.75), ("blocks.1.ffn.down", 0.0)]
    chosen = _chosen(sparsity=0.5, layer_sparsity=dict(reversed(items) if reverse else items))
    expected = {"attn.q": 0.5, "attn.o": 0.5, "ffn.up": 0.25, "ffn.down": 0.25}
    assert chosen == {name: 0.0 if name == "blocks.1.ffn.down" else expected[name[9:]] for name in SHAPES}


@pytest.mark.parametrize("keys, message", [
    ({"targets": ("*.Wqkv",)}, r"prune\.targets: \*\.Wqkv matches no prunable linear .* blocks\.0\.attn\.q, blocks\.0"),
    ({"ignore": ("attn.q",)}, r"prune\.ignore: attn\.q matches no prunable linear"),
    ({"layer_sparsity": {"*.Q": 0.1}}, r"prune\.layer_sparsity: \*\.Q matches no prunable linear"),
    ({"ignore": ("*",)}, r"leave no linear to prune"),
    ({"layer_sparsity": {"*.q": 0.999}}, r"^prune\.layer_sparsity=0\.999 keeps none of the 8 x 8 weights of blocks"),
])
def test_patterns_that_do_not_fit_the_model_are_refused(keys, message):
    with pytest.raises(UserError, match=message):
        _chosen(sparsity=0.5, **keys)


def test_a_group_need_only_divide_what_is_pruned():
    with pytest.raises(UserError, match=r"2:4 does not divide blocks\.0\.ffn\.down"):
        _chosen(pattern="2:4")
    assert len(_chosen(pattern="2:4", ignore=("*.down",))) == 6


@pytest.mark.parametrize("keys, message", [
    ({"pattern": "2:4"}, "pattern=unstructured"), ({"sparsity": (0.5, 0.75)}, "give one prune.sparsity"),
])
def test_sparsities_per_layer_are_for_one_unstructured_level(keys, message):
    with pytest.raises(ValueError, match=message):
        PruneConfig(layer_sparsity={"*": 0.1}, **keys)


KEYS = {"method": "magnitude", "sparsity": 0.5, "ignore": ("*.out_proj", "*.0.ffn.*"),
        "layer_sparsity": {"*Wqkv": 0.75}}


@pytest.fixture
def models():
    """(dense, the same pruned as KEYS say)"""
    torch.manual_seed(0)
    dense = tiny_mpt(d_model=64, vocab_size=300)
    sparse = copy.deepcopy(dense)
    return dense, sparsify(sparse, prune(sparse, [], PruneConfig(**KEYS)))


def _is_ignored(name):
    return "out_proj" in name or ".0.ffn" in name


def test_what_is_ignored_stays_a_dense_linear_in_every_folder(models, tmp_path):
    dense, sparse = models
    save_model(tmp_path / "saved", sparse, tiny_tokenizer())
    export_sparse(sparse, tiny_tokenizer(), "int8", tmp_path / "int8")
    weights = {name: linear.weight for name, linear in sparse_linears(sparse).items()}
    loaded, runtime = load_model(tmp_path / "saved"), load(tmp_path / "int8").model
    for name, linear in family_of(dense).prunable_linears(dense).items():
        if _is_ignored(name):
            for model in (sparse, loaded, runtime):
                assert type(model.get_submodule(name)) is nn.Linear, name
                assert torch.equal(model.get_submodule(name).weight, linear.weight), name
        else:
            assert weights[name].sparsity == (0.75 if "Wqkv" in name else 0.5), name
            assert isinstance(loaded.get_submodule(name), SparseLinear)
            assert isinstance(runtime.get_submodule(name), PackedLinear)
    export_dense(sparse, tiny_tokenizer(), tmp_path / "dense")
    assert unpruned_zeros(tmp_path / "dense", weights.items()) == []


def test_parameters_are_counted_as_they_are_pruned(models):
    dense, sparse = models
    counts = count_parameters(dense, PruneConfig(**KEYS))
    linears = sparse_linears(sparse).values()
    assert counts.prunable == sum(linear.in_features * linear.out_features for linear in linears)
    assert counts.kept == (sum(linear.values.numel() for linear in linears),)


def test_a_run_is_refused_for_a_pattern_that_matches_nothing_and_counts_what_it_prunes():
    run = {"model": {"d_model": 32, "n_layers": 1}, "prune": {"sparsity": 0.5, "ignore": ("*.up_proj",)}}
    config = RunConfig.model_validate(run)
    counts = validate(config, dry_run=True).parameters
    assert counts.prunable == (4 + 4) * 32 * 32 and counts.kept == (counts.prunable // 2,)
    assert summarise(config, counts)[1].startswith(f"50% sparse: {counts.prunable // 2:,} prunable")
    run["prune"]["ignore"] = ("*.gate_proj",)
    with pytest.raises(UserError, match=r"\*\.gate_proj matches no prunable .*transformer\.blocks\.0\.attn\.Wqkv"):
        validate(RunConfig.model_validate(run), dry_run=True)


class _Alpha(Section):
    alpha: float = 0.5


class _Mine(Pruner):
    Options = _Alpha

    def prune(self, layer, statistics):
        keep = layer.weight > self.options.alpha
        return layer.weight * keep, keep


def test_a_method_of_another_package_gets_its_own_options(monkeypatch):
    monkeypatch.setitem(PRUNERS.entries, "mine", PrunerEntry(f"{__name__}:_Mine", calibrates=False))
    model = tiny_mpt()
    before = {name: linear.weight.clone() for name, linear in family_of(model).prunable_linears(model).items()}
    weights = prune(model, [], PruneConfig(method="mine", sparsity=0.5, options={"alpha": 0.01}))
    assert all(torch.equal(weight.keep, before[name] > 0.01) for name, weight in weights.items())
    for options, message in (({"alpha": "x"}, r"^prune\.options\.alpha=x: give a number, such as 0\.5$"),
                             ({"alhpa": 1.0}, r"^there is no key prune\.options\.alhpa; did you mean prune\.options\.al"
                                              r"pha\? \(valid here: alpha\)$")):
        with pytest.raises(UserError, match=message):
            build_pruner(PruneConfig(method="mine", sparsity=0.5, options=options))
    with pytest.raises(UserError, match=r"^prune\.options: prune\.method=wanda has no options of its own"):
        build_pruner(PruneConfig(method="wanda", sparsity=0.5, options={"alpha": 1.0}))
