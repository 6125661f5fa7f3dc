"""Pruning against the definitions, written out slowly in fp64."""

import logging

import pytest
import torch

from sparse_train.config import PruneConfig
from sparse_train.errors import UserError
from sparse_train.models import family_of
from sparse_train.pruning import build_pruner, prune
from sparse_train.pruning.calls import Call, record_calls
from sparse_train.pruning.collect import collect
from sparse_train.pruning.pattern import keep_groups, keep_largest
from sparse_train.pruning.pruner import Layer
from sparse_train.pruning.sparsegpt import SparseGPT
from sparse_train.pruning.statistics import Gradients, Hessian
from sparse_train.registry import PRUNERS
from sparse_train.tasks import Batch
from sparse_train.tasks.batch import collate
from tests.models import tiny_examples, tiny_model, tiny_mpt

METHODS = list(PRUNERS.entries)
PATTERNS = [{"sparsity": 0.75}, {"sparsity": 0.5}, {"pattern": "2:4"}, {"pattern": "4:16"}]


def make_problem(rows=6, columns=48, tokens=200):
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(rows, columns, generator=generator)
    # As activations are: a few strong directions under noise. Compensation has something to work with.
    strong = torch.randn(tokens, 8, generator=generator) @ torch.randn(8, columns, generator=generator)
    inputs = strong + 0.5 * torch.randn(tokens, columns, generator=generator)
    return weight, inputs, 2 * inputs.T @ inputs / tokens


def sparsegpt(weight, hessian, spec, name="weight", earlier=None):
    """`hessian`: the matrix H (C, C)."""
    statistics = Hessian(len(hessian), hessian.device)
    statistics.sum, statistics.num_tokens = hessian.flatten(), 1  # one piece
    return SparseGPT().prune(Layer(name, weight, spec.levels[0], earlier), statistics)


def _oracle(weight, hessian, spec):
    """SparseGPT from its definition: after each column, the inverse of what is left of H is computed anew."""
    weight, h = weight.double().clone(), hessian.double().clone()
    num_rows, num_columns = weight.shape
    h += torch.eye(num_columns) * spec.damping * h.diagonal().mean()
    inverses = [torch.linalg.inv(h[j:, j:]) for j in range(num_columns)]
    pivot = torch.stack([inverse[0, 0] for inverse in inverses])
    keep = torch.zeros(num_rows, num_columns, dtype=torch.bool)
    width = spec.group[1] if spec.group else spec.block_size
    for j in range(num_columns):
        if j % width == 0:
            block = slice(j, min(j + width, num_columns))
            scores = weight[:, block] ** 2 / pivot[block]
            if spec.group:
                for row in range(num_rows):
                    keep[row, j + scores[row].topk(spec.group[0]).indices] = True
            else:
                total = round((1 - spec.sparsity) * num_rows * block.stop) - round((1 - spec.sparsity) * num_rows * j)
                best = scores.flatten().topk(total).indices
                keep[best // scores.shape[1], j + best % scores.shape[1]] = True
        for row in range(num_rows):
            if not keep[row, j]:
                weight[row, j:] -= weight[row, j].clone() / pivot[j] * inverses[j][0]
                weight[row, j] = 0
    return weight, keep


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("block_size", [16, 128])
def test_sparsegpt_is_its_definition(pattern, block_size):
    weight, _, hessian = make_problem()
    spec = PruneConfig(block_size=block_size, **pattern)
    updated, keep = sparsegpt(weight, hessian, spec)
    expected, expected_keep = _oracle(weight, hessian, spec)
    assert torch.equal(keep, expected_keep)
    assert not updated[~keep].any()
    torch.testing.assert_close(updated.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_sparsegpt_reconstructs_better_than_magnitude(pattern):
    weight, inputs, hessian = make_problem()
    updated, keep = sparsegpt(weight, hessian, PruneConfig(**pattern))
    spec = PruneConfig(**pattern)
    plain = keep_groups(weight.abs(), spec.group) if spec.group else keep_largest(weight.abs(), int(keep.sum()))
    mine, theirs = ((inputs @ (w - weight).T).norm() for w in (updated, weight * plain))
    assert mine < 0.8 * theirs


def test_a_column_that_never_fires_is_pruned_first():
    weight, _, hessian = make_problem()
    hessian[5] = hessian[:, 5] = 0
    updated, _ = sparsegpt(weight * 100, hessian, PruneConfig(sparsity=0.5))
    assert not updated[:, 5].any() and torch.isfinite(updated).all()


def test_a_failing_cholesky_is_tried_with_more_damping_then_named(caplog):
    weight, _, _ = make_problem()
    nearly = torch.ones(48, 48) * 1.0  # rank one; a tiny damping leaves fp32 no pivot
    nearly[0, 1] += 1e-3
    with caplog.at_level(logging.WARNING):
        updated, _ = sparsegpt(weight, nearly, PruneConfig(sparsity=0.5, damping=1e-9), "some.layer")
    assert torch.isfinite(updated).all() and "some.layer: Cholesky failed" in caplog.text
    with pytest.raises(UserError, match=r"some\.layer: its Hessian is singular"):
        sparsegpt(weight, -torch.eye(48), PruneConfig(sparsity=0.5), "some.layer")
    for bad in ((weight * torch.nan, torch.eye(48)), (weight, torch.eye(48) * torch.inf)):
        with pytest.raises(UserError, match=r"^some\.layer: .* is not finite"):
            sparsegpt(*bad, PruneConfig(sparsity=0.5), "some.layer")


@pytest.mark.parametrize("count", [0, 1, 7, 20])
def test_counts_are_exact_and_ties_go_to_the_first(count):
    keep = keep_largest(torch.ones(4, 5), count)
    assert keep.sum() == count and keep.flatten()[:count].all()
    assert keep_largest(torch.tensor([torch.nan, 1, torch.inf, 2]), count % 4).sum() == count % 4


def test_groups_keep_the_largest_of_each():
    scores = torch.tensor([[1.0, 3, 2, 0, 5, 5, 5, 5]])
    assert keep_groups(scores, (2, 4)).int().tolist() == [[0, 1, 1, 0, 1, 1, 0, 0]]


def _batches(extra_padding=0):
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(3):
        ids = torch.randint(50, (2, 12 + extra_padding), generator=torch.Generator().manual_seed(len(found)))
        ids[:, :12] = torch.randint(50, (2, 12), generator=generator)
        attend = torch.zeros_like(ids, dtype=torch.bool)
        attend[0, :12], attend[1, :7] = True, True
        found.append(Batch(ids, attend, ids))
    return found


def _model():
    torch.manual_seed(0)
    return tiny_mpt()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", [{"sparsity": 0.75}, {"sparsity": 0.0}, {"pattern": "2:4"},
                                     {"sparsity": 0.75, "refit": True}], ids=str)
def test_every_prunable_linear_is_pruned_to_the_count_and_nothing_else_changes(method, pattern):
    model, before = _model(), _model()
    spec = PruneConfig(method=method, **({**pattern, "refit": None} if method == "obert" else pattern))
    weights = prune(model, _batches(), spec)
    assert sorted(weights) == sorted(family_of(model).prunable_linears(model))
    for name, weight in weights.items():
        assert weight.values.numel() == round((1 - spec.sparsity) * weight.shape[0] * weight.shape[1])
        assert torch.equal(model.get_submodule(name).weight, weight.to_dense())
        if spec.group:
            assert (weight.keep.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    for name, tensor in before.state_dict().items():
        if name.removesuffix(".weight") not in weights:
            assert torch.equal(tensor, model.state_dict()[name]), name
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_padding_does_not_count():
    spec = PruneConfig(method="sparsegpt", sparsity=0.5)
    plain, padded = (prune(_model(), batches, spec) for batches in (_batches(), _batches(extra_padding=9)))
    for name, weight in plain.items():
        assert torch.equal(weight.bitmask, padded[name].bitmask), name
        torch.testing.assert_close(weight.values, padded[name].values, rtol=1e-3, atol=1e-4)


def test_a_block_sees_the_inputs_that_the_pruned_blocks_before_it_make():
    spec = PruneConfig(method="sparsegpt", sparsity=0.75)
    pruned, name = _model(), "transformer.blocks.1.attn.Wqkv"
    weights = prune(pruned, _batches(), spec)
    model = _model()
    model.transformer.blocks[0].load_state_dict(pruned.transformer.blocks[0].state_dict())
    found = []
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: found.append(args[0]))
    for batch in _batches():
        with torch.no_grad():
            model(input_ids=batch.input_ids, attention_mask=batch.attend.long())
        found[-1] = found[-1][batch.attend]
    inputs = torch.cat(found)
    expected, _ = sparsegpt(model.get_submodule(name).weight, 2 * inputs.T @ inputs / len(inputs), spec)
    torch.testing.assert_close(weights[name].to_dense(), expected, rtol=1e-3, atol=1e-4)


class _Three(torch.nn.Module):
    """`b` gets the inputs of `a` where the first state is positive; `c` runs twice on one input, once on another."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Linear(8, 8) for _ in range(3))

    def forward(self, hidden_states):
        a = self.a(hidden_states)
        b = self.b(hidden_states if hidden_states.flatten()[0] > 0 else a)
        both = a + b
        return self.c(self.c(both) + self.c(both))


def test_linears_share_statistics_exactly_as_long_as_they_share_inputs():
    torch.manual_seed(0)
    block = _Three()
    linears = dict(block.named_children())
    for signs, shares in (((1, 1), True), ((1, -1), False), ((-1, 1), False)):
        states = [sign * torch.rand(2, 5, 8) for sign in signs]
        seen = {name: [] for name in linears}
        handles = [linear.register_forward_pre_hook(lambda module, args, into=seen[name]: into.append(args[0]))
                   for name, linear in linears.items()]
        attend = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]).bool()
        with torch.no_grad():
            found = collect(build_pruner(PruneConfig(sparsity=0.5)), block, linears,
                             [Call((x,), {}) for x in states], [Batch(attend.long(), attend, attend.long())] * 2,
                             "decoder")
        for handle in handles:
            handle.remove()
        assert (found["a"] is found["b"]) == shares and found["c"] not in (found["a"], found["b"])
        for name, statistics in found.items():
            inputs = torch.cat([x[attend] for x in seen[name]]).double()
            assert statistics.num_tokens == len(inputs), name
            torch.testing.assert_close(statistics.mean().double(), 2 * inputs.T @ inputs / len(inputs))


def test_a_block_ends_at_its_last_inputs_where_the_first_batch_gave_each_linear_its_inputs_once():
    """The third linear has three products, so the block ends early only where that one does not count."""
    torch.manual_seed(0)
    block, attend = _Three(), torch.ones(2, 5, dtype=torch.bool)
    for names, num_runs in (("ab", 3), ("abc", 9)):
        runs = []
        handle = block.c.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        with torch.no_grad():
            found = collect(build_pruner(PruneConfig(sparsity=0.5)), block,
                            {name: block.get_submodule(name) for name in names},
                            [Call((torch.rand(2, 5, 8),), {}) for _ in range(3)],
                            [Batch(attend.long(), attend, attend.long())] * 3, "decoder")
        handle.remove()
        assert len(runs) == num_runs and {name: statistics.num_tokens for name, statistics in found.items()} == {
            name: 90 if name == "c" else 30 for name in names}


@pytest.mark.parametrize("depends", [False, True])
def test_blocks_are_skipped_only_where_no_other_argument_depends_on_them(depends):
    """Recorded with and without skipping, each block is called with the same masks and positions."""
    model, processor = tiny_model("llama")
    blocks = list(family_of(model).blocks(model).values())
    batches = [collate(tiny_examples(processor)[start:start + 2], processor) for start in (0, 2)]
    seen, num_runs = [], []

    def add_argument(module, args, kwargs):
        return args, kwargs | {"extra": args[0].mean() if depends else torch.ones(1)}

    blocks[1].register_forward_pre_hook(add_argument, with_kwargs=True)
    handle = blocks[1].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(Call(args, kwargs).others()), with_kwargs=True)
    with torch.no_grad():
        for batch in batches:
            model(**batch.inputs(), use_cache=False)
        handle.remove()
        blocks[0].mlp.down_proj.register_forward_hook(lambda *_: num_runs.append(1))
        records = record_calls(model, blocks, batches)
    for record, expected in zip(records, seen, strict=True):
        found = record[1].others()
        assert len(found) == len(expected) > 1 and all(map(torch.equal, found, expected))
    assert len(num_runs) == (2 if depends else 1)
    if depends:
        with pytest.raises(UserError, match=r"obert\) needs blocks that get hidden states alone .* this llama model"):
            prune(model, batches, PruneConfig(method="obert", sparsity=0.5))


def test_a_pattern_that_does_not_divide_a_width_is_refused_before_anything_changes():
    model = _model()
    with pytest.raises(UserError, match="pattern 3:7 does not divide transformer"):
        prune(model, [], PruneConfig(pattern="3:7"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), _model().parameters(), strict=True))


@pytest.mark.parametrize("num_batches", [0, 1])
def test_sparsegpt_without_a_token_is_refused(num_batches):
    """Also where all is padding: a Hessian of zeros would make every kept value 0, silently."""
    ids = torch.zeros(1, 3, dtype=torch.long)
    batches = [Batch(ids, ids.bool(), ids)] * num_batches
    with pytest.raises(UserError, match=r"no calibration token reached transformer\.blocks\.0\.attn\.Wqkv"):
        prune(_model(), batches, PruneConfig(sparsity=0.5))


def test_too_few_tokens_for_a_hessian_are_said_once_with_the_number_that_would_do(caplog):
    with caplog.at_level(logging.WARNING):
        prune(_model(), _batches(), PruneConfig(sparsity=0.5))
    (line,) = caplog.messages
    columns, num_tokens = 128, 57  # of the widest linear; three batches of 12 + 7
    assert line.startswith(f"transformer.blocks.0.ffn.down_proj has {columns} columns, and {num_tokens} calibration")
    assert f"{columns} tokens would do (prune.num_calibration times 3)" in line
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        prune(_model(), 3 * _batches(), PruneConfig(sparsity=0.5))
        prune(_model(), _batches(), PruneConfig(method="wanda", sparsity=0.5))
    assert not caplog.messages


def test_inputs_that_are_not_finite_name_the_linear_the_batch_and_the_example():
    batches, model = _batches(), _model()

    def spoil(module, args, output):
        if torch.equal(args[0], batches[1].input_ids):
            output[1, 3, 5] = torch.nan  # attention takes it to the tokens behind it in this example
        return output

    model.transformer.wte.register_forward_hook(spoil)
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.Wqkv: .* not finite in example 2 of calibration batch 2;"):
        prune(model, batches, PruneConfig(method="wanda", sparsity=0.5))


@pytest.mark.parametrize("keys, message", [
    ({"sparsity": 0.5}, r"prune\.sparsity=0\.5 is below; choose a higher one"),
    ({"sparsity": 0.9, "layer_sparsity": {"*.up_proj": 0.3}}, r"prune\.layer_sparsity=0\.3 is below; choose a higher"),
    ({"pattern": "2:4"}, r"prune\.pattern=2:4 keeps more; choose a sparser pattern"),
])
def test_a_sparsity_below_the_one_that_a_model_has_is_refused_before_anything_changes(keys, message):
    model, earlier = _model(), {}
    name = "transformer.blocks.1.ffn.up_proj"
    earlier[name] = torch.rand(model.get_submodule(name).weight.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    with pytest.raises(UserError, match=rf"blocks\.1\.ffn\.up_proj has 0\.\d+ zeros .*{message}"):
        prune(model, _batches(), PruneConfig(**keys), earlier=earlier)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), _model().parameters(), strict=True))


def test_inputs_that_are_not_one_per_token_are_refused():
    model = _model()
    linear = model.transformer.blocks[0].ffn.down_proj
    linear.register_forward_pre_hook(lambda module, args: (torch.cat([args[0], args[0]]),))
    linear.register_forward_hook(lambda module, args, output: output[:2])
    with pytest.raises(UserError, match=r"blocks\.0\.ffn\.down_proj multiplies 48 positions where the batch has 24"):
        prune(model, _batches(), PruneConfig(sparsity=0.5))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("first", METHODS)
def test_a_chain_keeps_earlier_zeros_and_counts_exactly(first, method):
    """The weights between the levels are anything, zeros come back in no position, also where a block of columns has
    lost more than its share."""
    torch.manual_seed(0)
    weight, inputs, gradients = torch.randn(24, 40), torch.randn(200, 40), torch.randn(10, 20, 24)
    weight[:, :8] *= 0.01  # magnitude empties these columns
    keep = None
    for sparsity in (0.5, 0.75, 0.9):
        spec = PruneConfig(sparsity=sparsity, block_size=8)
        pruner = build_pruner(PruneConfig(method=first if keep is None else method, sparsity=sparsity))
        if pruner.Statistics is Gradients:
            statistics = Gradients()
            statistics.batches.append([(inputs.view(10, 20, 40), gradients)])
        elif statistics := pruner.Statistics and pruner.Statistics(40, torch.device("cpu")):
            statistics.add(inputs)
        _, new = pruner.prune(Layer("weight", weight, spec.levels[0], keep), statistics)
        assert new.sum() == round((1 - sparsity) * 24 * 40)
        assert keep is None or not (new & ~keep).any()
        keep, weight = new, torch.randn(24, 40) * new


def test_what_sparsegpt_updates_does_not_revive_earlier_zeros():
    torch.manual_seed(1)
    earlier, hessian = torch.rand(8, 16) < 0.5, Hessian(16, torch.device("cpu"))
    hessian.add(torch.randn(64, 16))
    weight, keep = sparsegpt(torch.randn(8, 16) * earlier, hessian.mean(), PruneConfig(pattern="2:4"), earlier=earlier)
    assert not (keep & ~earlier).any() and not weight[~keep].any()


def test_the_table_knows_which_methods_read_calibration_data():
    for name, entry in PRUNERS.entries.items():
        assert entry.calibrates == (PRUNERS.load(name).Statistics is not None), name
        assert set(entry.keys) <= set(PruneConfig.model_fields), name
