"""The losses against what PAPER's equations say, computed in loops, and against any way of splitting a batch.

In float64 throughout (plain.Float64), so that what is left of a difference is a fault of the formula.
"""

import contextlib
import math
from dataclasses import replace
from importlib.metadata import EntryPoint

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparse_train import registry
from sparse_train.config import LossConfig, RunConfig, TrainConfig, ZeroConfig
from sparse_train.config.load import load_config
from sparse_train.config.loss import METRICS
from sparse_train.errors import UserError
from sparse_train.registry import LOSS_TERMS, LossTermEntry
from sparse_train.sparse import densify, sparse_linears
from sparse_train.tasks.batch import collate
from sparse_train.training import losses, step
from sparse_train.training.head import Head
from sparse_train.training.losses import new_terms, weighted_loss
from sparse_train.training.metrics import Meter
from sparse_train.training.terms import LossTerm, ModelOutputs, Ratio
from sparse_train.training.terms.feature import FeatureTerm, squarehead
from sparse_train.training.terms.logit import divergence
from tests.models import tiny_examples, tiny_model, tiny_mpt
from tests.ranks import run_ranks
from tests.training.plain import Float64, states_of
from tests.training.test_parity import _fetch, _models, _training_run

B, T, D, V, L = 4, 6, 8, 11, 3
_EXACT = 1e-13  # a few hundred additions in float64
_LOSS = LossConfig(task_weight=0.7, logit_weight=0.4, feature_weight=1.3, temperature=2.0)


def _inputs(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    attend = torch.zeros(B, T, dtype=torch.bool)
    for row, length in enumerate((6, 3, 1, 4)):
        attend[row, :length] = True
    labels = torch.where(attend, torch.randint(V, (B, T), generator=g), -100)
    labels[0, :3] = -100
    logits, teacher_logits = (torch.randn(B, T, V, generator=g).to(dtype) for _ in range(2))
    features, taught = ([torch.randn(B, T, D, generator=g).to(dtype) for _ in range(L)] for _ in range(2))
    return logits, labels, attend, features, taught, teacher_logits


def _loss(config, logits, labels, attend, features=(), taught=(), teacher_logits=None):
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    with Float64() if logits.dtype == torch.float64 else contextlib.nullcontext():
        terms = new_terms(config)
        if terms["feature"].uses_features:
            for s, t in zip(features, taught, strict=True):
                terms["feature"].add_features(s, t, attend)
        rows = [x.flatten(0, 1) for x in (logits, targets, labels)]
        taught = torch.empty(0) if teacher_logits is None else teacher_logits.flatten(0, 1)
        return weighted_loss(config, terms, ModelOutputs(*rows, taught))


def _vector(shares):
    """The loss and all terms end to end."""
    return torch.cat([shares.loss.detach()[None], *(term.detach().reshape(-1) for term in shares.terms.values())])


def _squarehead(*arguments):
    with Float64():
        return squarehead(*arguments)


def _by_hand(logits, labels, attend, features, taught, teacher_logits):
    task = logit = count = 0.0
    for b in range(B):
        for t in range(1, T):
            if labels[b, t] == -100:
                continue
            count += 1
            student, teacher = logits[b, t - 1], teacher_logits[b, t - 1]
            task -= student.log_softmax(-1)[labels[b, t]].item()
            p, q = ((x / _LOSS.temperature).softmax(-1).tolist() for x in (teacher, student))
            logit += sum(a * math.log(a / c) for a, c in zip(p, q, strict=True)) * _LOSS.temperature**2
    terms = []
    for s, t in zip(features, taught, strict=True):
        error = energy = 0.0
        for b in range(B):
            for place in range(T):
                if attend[b, place]:
                    error += ((s[b, place] - t[b, place]) ** 2).sum().item()
                    energy += (t[b, place] ** 2).sum().item()
        terms.append(error / energy)
    return task / count, logit / count, terms


def test_the_terms_are_the_equations():
    inputs = _inputs()
    task, logit, terms = _by_hand(*inputs)
    shares = _loss(_LOSS, *inputs)
    assert shares.terms["task"].item() == pytest.approx(task, rel=_EXACT)
    assert shares.terms["logit"].item() == pytest.approx(logit, rel=_EXACT)
    assert shares.terms["feature"].tolist() == pytest.approx(terms, rel=_EXACT)
    assert shares.loss.item() == pytest.approx(0.7 * task + 0.4 * logit + 1.3 * sum(terms), rel=_EXACT)
    assert _squarehead(inputs[3], inputs[4], inputs[2]).tolist() == pytest.approx(terms, rel=_EXACT)


def test_what_stands_at_padding_changes_nothing():
    logits, labels, attend, features, taught, teacher_logits = _inputs()
    spoilt = [torch.where(attend[..., None], f, torch.full_like(f, 1e6)) for f in features]
    before = _loss(_LOSS, logits, labels, attend, features, taught, teacher_logits)
    after = _loss(_LOSS, logits, labels, attend, spoilt, taught, teacher_logits)
    assert torch.equal(before.loss, after.loss)


def test_weights_select_the_terms():
    logits, labels, attend, features, taught, _ = _inputs()
    plain = _loss(LossConfig(), logits, labels, attend)
    assert plain.terms["feature"].numel() == 0 and plain.terms["logit"] == 0
    torch.testing.assert_close(plain.loss, plain.terms["task"])
    assert _loss(LossConfig(task_weight=0, feature_weight=1.0), logits, labels, attend, features,
                             taught).loss.item() == pytest.approx(
        _squarehead(features, taught, attend).sum().item(), rel=_EXACT)


def test_an_all_zero_teacher_makes_no_nan():
    logits, labels, attend, _, taught, _ = _inputs(torch.float32)
    same = [torch.zeros_like(f) for f in taught]
    shares = _loss(LossConfig(feature_weight=1.0), logits, labels, attend, same, same)
    assert torch.isfinite(shares.loss)


def test_layers_that_do_not_pair_are_refused():
    _, _, attend, features, taught, _ = _inputs()
    with pytest.raises(ValueError, match="3 student layers cannot be paired with 2"):
        squarehead(features, taught[:2], attend)


def _share(splits):
    from sparse_train import dist
    logits, labels, attend, features, taught, teacher_logits = _inputs()
    leaf = logits.clone().requires_grad_()
    rows = splits[dist.rank()]
    if rows:
        shares = _loss(_LOSS, leaf[rows], labels[rows], attend[rows], [f[rows] for f in features],
                                   [f[rows] for f in taught], teacher_logits[rows])
    else:  # a row of padding, as an empty batch is collated
        shares = _loss(_LOSS, leaf[:1], torch.full_like(labels[:1], -100),
                                   torch.zeros_like(attend[:1]), [f[:1] for f in features],
                                   [f[:1] for f in taught], teacher_logits[:1])
    shares.loss.backward()
    return _vector(shares), leaf.grad


@pytest.mark.parametrize("splits", [([0, 1, 2, 3], []), ([0], [1, 2, 3]), ([2], [0, 1, 3])], ids=str)
def test_shares_over_ranks_add_up_to_the_whole_batch(splits):
    inputs = _inputs()
    leaf = inputs[0].clone().requires_grad_()
    whole = _loss(_LOSS, leaf, *inputs[1:])
    whole.loss.backward()
    ranks = run_ranks(_share, 2, splits)
    torch.testing.assert_close(sum(terms for terms, _ in ranks), _vector(whole), rtol=_EXACT, atol=0)
    torch.testing.assert_close(sum(grad for _, grad in ranks), leaf.grad, rtol=_EXACT, atol=1e-18)


@pytest.mark.parametrize(("preset", "epsilon", "over", "task_weight"), [
    ("paper-mpt", torch.finfo(torch.bfloat16).eps, "gathered", 1.0), ("paper-t5", 1e-9, "masked", 1.0),
    ("paper-whisper", 1e-8, "masked", 0.5), ("sparseml", 0.0, "gathered", 1.0)])
def test_presets_are_the_formulas_of_their_codes(preset, epsilon, over, task_weight):
    config = LossConfig(preset=preset)
    logits, labels, attend, features, taught, teacher_logits = _inputs()
    small = [t * 1e-2 for t in taught]  # where an epsilon counts
    for teacher in (taught, small):
        shares = _loss(config, logits, labels, attend, features, teacher, teacher_logits)
        mask = attend.float()
        expected = 0.0
        for s, t in zip(features, teacher, strict=True):
            if over == "gathered":
                error, energy = ((s[attend] - t[attend]) ** 2).mean(), (t[attend] ** 2).mean()
            else:
                error, energy = (mask[..., None] * (s - t) ** 2).mean(), (mask[..., None] * t**2).mean()
            expected = expected + error / (energy + epsilon)
        torch.testing.assert_close(shares.terms["feature"].sum(), expected, rtol=_EXACT, atol=0)
        torch.testing.assert_close(shares.loss, task_weight * shares.terms["task"] + expected, rtol=_EXACT, atol=0)


def test_the_paper_compares_logits_at_the_labelled_positions():
    logits, labels, attend, _, _, teacher_logits = _inputs()
    config = LossConfig(preset="paper-mpt", feature_weight=0, logit_weight=1.0)
    chosen = labels != -100
    s, t = logits[chosen].log_softmax(-1), teacher_logits[chosen].log_softmax(-1)
    expected = (t.exp() * (t - s)).sum() / chosen.sum()
    torch.testing.assert_close(_loss(config, logits, labels, attend, teacher_logits=teacher_logits).terms["logit"],
                               expected)


def _summands_by_hand(teacher, student, beta):
    """Of probabilities (R, V), (R, V); beta 0 and 1 are the two KL divergences themselves."""
    def kl(p, q):
        return torch.where(p > 0, p * (p / q).log(), 0)

    if beta in (0, 1):
        return kl(student, teacher) if beta else kl(teacher, student)
    mixture = beta * teacher + (1 - beta) * student
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


_BETAS = pytest.mark.parametrize("beta", [0, 0.1, 0.5, 0.9, 1])


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@_BETAS
def test_divergences_and_their_gradients_are_the_formulas(beta, temperature):
    logits, labels, attend, _, _, teacher_logits = _inputs()
    config = LossConfig(task_weight=0, logit_weight=0.4, temperature=temperature, logit_beta=beta)
    ours, plain = (logits.clone().requires_grad_() for _ in range(2))
    shares = _loss(config, ours, labels, attend, teacher_logits=teacher_logits)
    shares.loss.backward()
    chosen = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100) != -100
    teacher, student = ((x[chosen] / temperature).softmax(-1) for x in (teacher_logits, plain))
    expected = _summands_by_hand(teacher, student, beta).sum(-1).mean() * temperature**2
    (0.4 * expected).backward()
    torch.testing.assert_close(shares.terms["logit"], expected.detach(), rtol=_EXACT, atol=0)
    torch.testing.assert_close(ours.grad, plain.grad, rtol=1e-10, atol=_EXACT)


def test_the_ends_of_the_jensen_shannon_divergence_are_both_kl_divergences():
    logits, teacher_logits = (_inputs()[i].flatten(0, 1).log_softmax(-1) for i in (0, 5))
    small = 1e-9
    for near, end, factor in ((small, 0, small), (1 - small, 1, small)):
        torch.testing.assert_close(divergence(teacher_logits, logits, near) / factor,
                                   divergence(teacher_logits, logits, end), rtol=1e-5, atol=0)


@_BETAS
def test_equal_distributions_do_not_diverge(beta):
    logits = _inputs(torch.float32)[0].flatten(0, 1).mul(9).log_softmax(-1).requires_grad_()
    assert not divergence(logits.detach(), logits, beta).any()


@_BETAS
def test_tokens_that_the_teacher_or_both_never_say(beta):
    logits, labels, attend, _, _, teacher_logits = _inputs()
    labels = torch.where(labels == -100, labels, labels % 2)
    teacher_logits[..., 2] = logits[..., 5] = teacher_logits[..., 5] = -math.inf
    ours = logits.clone().requires_grad_()
    shares = _loss(LossConfig(task_weight=0, logit_weight=1.0, logit_beta=beta), ours, labels, attend,
                   teacher_logits=teacher_logits)
    if beta == 1:  # the student says what the teacher never does
        assert shares.terms["logit"] == math.inf
        return
    shares.loss.backward()
    chosen = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100) != -100
    p, q = (x[chosen].softmax(-1) for x in (teacher_logits, logits))
    expected = _summands_by_hand(p, q, beta).sum(-1).mean()
    torch.testing.assert_close(shares.terms["logit"], expected, rtol=_EXACT, atol=0)
    assert torch.isfinite(ours.grad).all() and not ours.grad[..., 5].any()


def test_the_ast_preset_is_the_formula_of_its_code():
    logits, labels, attend, _, _, teacher_logits = _inputs()
    shares = _loss(LossConfig(preset="ast"), logits, labels, attend, teacher_logits=teacher_logits)
    chosen = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    s, t = (x[chosen != -100] for x in (logits, teacher_logits))
    task = torch.nn.functional.cross_entropy(s, chosen[chosen != -100])
    kl = torch.nn.functional.kl_div((s / 2).log_softmax(-1), (t / 2).log_softmax(-1), reduction="batchmean",
                                    log_target=True) * 4
    torch.testing.assert_close(shares.loss, 0.33 * task + 0.67 * kl, rtol=_EXACT, atol=0)


def _many_logits(num_rows, vocabulary):
    """(student's in bf16 with gradient, labels, teacher's)."""
    g = torch.Generator().manual_seed(0)
    logits, taught = (torch.randn(1, num_rows, vocabulary, generator=g).bfloat16() for _ in range(2))
    return logits.requires_grad_(), torch.randint(vocabulary, (1, num_rows), generator=g), taught


@_BETAS
def test_gradients_of_all_terms_are_rounded_once(beta, monkeypatch):
    """To the logits' dtype, whatever the rows of a chunk."""
    logits, labels, taught = _many_logits(7, 32)
    config = LossConfig(logit_weight=0.4, temperature=2.0, logit_beta=beta)
    wide = logits.detach().float().requires_grad_()
    _loss(config, wide, labels, None, teacher_logits=taught).loss.backward()
    monkeypatch.setattr(losses, "_CHUNK", 2 * 32)
    _loss(config, logits, labels, None, teacher_logits=taught).loss.backward()
    assert logits.grad.dtype == torch.bfloat16 and torch.equal(logits.grad, wide.grad.bfloat16())


@_BETAS
class _Made(TorchDispatchMode):
    """What operations make, all of it still held."""

    def __init__(self):
        super().__init__()
        self.storages = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.storages += [(x.dtype, x.untyped_storage()) for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        return result

    def sizes(self, dtype):
        """Elements of each storage of `dtype`, largest first."""
        found = {storage.data_ptr(): storage.nbytes() // dtype.itemsize for kind, storage in self.storages
                 if kind == dtype}
        return sorted(found.values(), reverse=True)


@_BETAS
def test_logits_are_never_all_in_fp32(beta, monkeypatch):
    """Forward and backward: fp32 has a chunk's size, and the one new tensor of all logits' size is their gradient."""
    rows, logits, labels, taught = 4, *_many_logits(32, 64)
    monkeypatch.setattr(losses, "_CHUNK", rows * 64)
    with _Made() as made:
        shares = _loss(LossConfig(logit_weight=0.4, logit_beta=beta), logits, labels, None, teacher_logits=taught)
        torch.autograd.grad(shares.loss, logits)
    assert made.sizes(torch.float32)[0] == rows * 64
    logits_of_both_and_gradient = [32 * 64] * 3
    assert [size for size in made.sizes(torch.bfloat16) if size > rows * 64] == logits_of_both_and_gradient


def _head_cases():
    mpt = tiny_mpt()
    yield mpt, {"input_ids": torch.randint(50, (3, 7))}
    for family in ("llama", "t5", "whisper"):
        model, processor = tiny_model(family)
        yield model, collate(tiny_examples(processor), processor).inputs()


def test_the_head_works_on_the_positions_that_are_asked_for():
    for model, inputs in _head_cases():
        head, seen = Head(model), []
        model.get_output_embeddings().register_forward_hook(lambda m, i, o, seen=seen: seen.append(o.shape))
        whole = model(**inputs).logits
        every = torch.arange(whole[..., 0].numel())
        for positions in (torch.tensor([1, 4, 5, 11]), every, every[:0]):
            model.zero_grad()
            found = head.logits(model, inputs, positions)
            assert seen[-1][:-1] == (1, len(positions))
            torch.testing.assert_close(found, whole.flatten(0, 1)[positions])
            found.sum().backward()
            assert model.get_output_embeddings().weight.grad is not None
        assert model(**inputs).logits.shape == whole.shape


def test_a_model_without_a_head_of_its_own_computes_all_logits():
    model, inputs = next(_head_cases())
    whole = model(**inputs).logits
    model.get_output_embeddings = model.get_input_embeddings
    positions = torch.tensor([1, 4])
    assert torch.equal(Head(model).logits(model, inputs, positions), whole.flatten(0, 1)[positions])


def test_keys_beside_a_preset_win():
    config = LossConfig(preset="paper-whisper", task_weight=0.9, layers=[1, 2])
    assert config.task_weight == 0.9 and config.layers == (1, 2) and config.epsilon == 1e-8


def test_the_key_that_older_runs_hold_is_read_under_its_new_name():
    assert LossConfig(preset="paper-mpt") == LossConfig(preset="paper-mpt", final_feature="norm")
    assert LossConfig(preset="paper-mpt", final_feature="block").features == "blocks"
    assert LossConfig(feature_weight=1.0, final_feature="norm").features == "final_norm"
    with pytest.raises(ValueError, match=r"features\n.*'blocks', 'final_norm' or 'norms'"):
        LossConfig(final_feature="last")


def _micro_batch_share(splits):
    from sparse_train import dist
    logits, labels, attend, features, taught, _ = _inputs()
    rows = splits[dist.rank()]
    shares = _loss(LossConfig(preset="sparseml"), logits[rows], labels[rows], attend[rows],
                   [f[rows] for f in features], [f[rows] for f in taught])
    return _vector(shares)


def test_micro_batch_means_the_ranks_own_ratios():
    """Which is not the ratio over all ranks: that is why it is not the default."""
    logits, labels, attend, features, taught, _ = _inputs()
    alone = [_vector(_loss(LossConfig(preset="sparseml"), logits[rows], labels[rows], attend[rows],
                           [f[rows] for f in features], [f[rows] for f in taught])) for rows in ([0], [1, 2, 3])]
    ranks = run_ranks(_micro_batch_share, 2, ([0], [1, 2, 3]))
    torch.testing.assert_close(sum(ranks), sum(alone) / 2)
    whole = _vector(_loss(LossConfig(feature_weight=1.0), logits, labels, attend, features, taught))
    assert not torch.allclose(sum(ranks), whole, rtol=1e-3)


def _massive_inputs():
    """As _inputs, where the teacher's first token of two rows holds nearly all the energy, as in pretrained models."""
    logits, labels, attend, features, taught, teacher_logits = _inputs()
    for states in taught:
        states[:2, 0, 1] = 1e3
    return logits, labels, attend, features, taught, teacher_logits


def _ratio_by_hand(ratio, s, t, attend):
    """`feature_ratio` of one block in loops over tokens; s, t (B, T, D)."""
    pairs = [(s[b, place], t[b, place]) for b in range(B) for place in range(T) if attend[b, place]]
    if ratio == "token":
        return sum(((a - c) ** 2).sum() / (c**2).sum() for a, c in pairs) / len(pairs)
    if ratio == "channel":
        return sum(sum((a[d] - c[d]) ** 2 for a, c in pairs) / sum(c[d] ** 2 for _, c in pairs) for d in range(D)) / D
    if ratio == "typical":
        mean = math.exp(sum(c.norm().log().item() for _, c in pairs) / len(pairs))
        num_before, pairs = len(pairs), [(a, c) for a, c in pairs if c.norm() <= 10 * mean]
        assert len(pairs) == num_before - 2
    return sum(((a - c) ** 2).sum() for a, c in pairs) / sum((c**2).sum() for _, c in pairs)


_RATIOS = ("block", "typical", "token", "channel")


@pytest.mark.parametrize("ratio", _RATIOS)
def test_a_ratio_is_its_sum_in_loops_with_its_gradient(ratio):
    logits, labels, attend, features, taught, _ = _massive_inputs()
    mine, theirs = ([f.clone().requires_grad_() for f in features] for _ in range(2))
    shares = _loss(LossConfig(task_weight=0, feature_weight=1.0, feature_ratio=ratio), logits, labels, attend, mine,
                   taught)
    expected = torch.stack([_ratio_by_hand(ratio, s, t, attend) for s, t in zip(theirs, taught, strict=True)])
    torch.testing.assert_close(shares.terms["feature"], expected, rtol=_EXACT, atol=0)
    shares.loss.backward()
    expected.sum().backward()
    for my, their in zip(mine, theirs, strict=True):
        torch.testing.assert_close(my.grad, their.grad, rtol=_EXACT, atol=1e-18)


def test_a_heavy_token_ratio_has_no_gradient_at_padding():
    logits, labels, attend, features, taught, _ = _inputs(torch.float32)
    mine = features[0].clone().requires_grad_()
    config = LossConfig(feature_weight=1e3, feature_ratio="token")
    _loss(config, logits, labels, attend, [mine], taught[:1]).loss.backward()
    assert mine.grad.isfinite().all() and not mine.grad[~attend].any()


def _shares_of_ratios(splits):
    from sparse_train import dist
    logits, labels, attend, features, taught, _ = _massive_inputs()
    rows = splits[dist.rank()]
    return [_vector(_loss(LossConfig(feature_weight=1.0, feature_ratio=ratio), logits[rows], labels[rows], attend[rows],
                          [f[rows] for f in features], [t[rows] for t in taught])) for ratio in _RATIOS]


def test_every_ratio_is_that_of_the_whole_batch_over_ranks():
    logits, labels, attend, features, taught, _ = _massive_inputs()
    ranks = run_ranks(_shares_of_ratios, 2, ([0, 3], [1, 2]))
    for ratio, first, second in zip(_RATIOS, *ranks, strict=True):
        whole = _vector(_loss(LossConfig(feature_weight=1.0, feature_ratio=ratio), logits, labels, attend, features,
                              taught))
        torch.testing.assert_close(first + second, whole, rtol=_EXACT, atol=0)


def test_encoder_and_decoder_features_have_their_own_masks():
    """Two stacks of different lengths in one loss: each feature counts where its own mask says."""
    _, _, attend, features, taught, _ = _inputs()
    sums = FeatureTerm(LossConfig(feature_weight=1.0))
    encoder, taught_encoder = torch.randn(2, B, 9, D, dtype=torch.float64)
    real = torch.arange(9) < torch.tensor([9, 2, 5, 1])[:, None]
    with Float64():
        sums.add_features(encoder, taught_encoder, real)
        sums.add_features(features[0], taught[0], attend)
    for (error, energy), (s, t, mask) in zip(zip(sums.errors, sums.energies, strict=True),
                                             [(encoder, taught_encoder, real), (features[0], taught[0], attend)],
                                             strict=True):
        torch.testing.assert_close(error / energy, ((s - t)[mask] ** 2).sum() / (t[mask] ** 2).sum())


def test_the_features_gradient_is_autograds():
    _, _, attend, features, taught, _ = _inputs()
    mine, theirs = features[0].clone().requires_grad_(), features[0].clone().requires_grad_()
    _squarehead([mine], [taught[0]], attend).sum().backward()
    ((((theirs - taught[0])[attend]) ** 2).sum() / (taught[0][attend] ** 2).sum()).backward()
    torch.testing.assert_close(mine.grad, theirs.grad)
    assert not mine.grad[~attend].any()


class Smoothness(LossTerm):
    """A term of another package: the mean square of the logits at targets."""

    uses_teacher_logits = False

    def ratio(self, outputs):
        return Ratio(outputs.predictions.square().sum(), outputs.num_targets)


class Likeness(LossTerm):
    """Another one: per block the mean square distance of the features."""

    uses_features, uses_teacher_logits = True, False

    def __init__(self, config):
        super().__init__(config)
        self.errors, self.counts = [], []

    def add_features(self, student, teacher, attend):
        self.errors.append((student - teacher)[attend].float().square().sum())
        self.counts.append(attend.sum() * student.shape[-1])

    def ratio(self, outputs):
        return Ratio(torch.stack(self.errors), torch.stack(self.counts))


@contextlib.contextmanager
def _other_package():
    """Adds both by entry points."""
    points = [EntryPoint(name, f"{__name__}:{name.title()}", LOSS_TERMS.group) for name in ("smoothness", "likeness")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "entry_points", lambda group: points if group == LOSS_TERMS.group else [])
        LOSS_TERMS.__dict__.pop("entries", None)
        yield patch
    LOSS_TERMS.__dict__.pop("entries", None)


def _step_of_another_package(loss):
    """(metrics, gradients) of one step, and the same of the plain formulas."""
    config = TrainConfig(steps=1, batch_size=4, clip=0, zero=ZeroConfig(stage=0))
    run, gradients = replace(_training_run(config), loss=loss), {}
    bits = {f"{name}.weight": linear.weight.keep for name, linear in sparse_linears(run.student).items()}

    def keep_gradients(engine):
        gradients.update((name, p.grad.clone()) for name, p in engine.module.named_parameters() if p.requires_grad)
        return 1.0

    with _other_package() as patch:
        patch.setattr(step, "step_engine", keep_gradients)
        trainer, meter = step.Trainer(run), Meter()
        meter.add(trainer.step(1))
        metrics = meter.report()
    student, teacher = _models()
    student, batch = densify(student).train(), _fetch(run.order.indices(0, 0))
    logits, states = states_of(student, batch.inputs())
    with torch.no_grad():
        _, taught = states_of(teacher.eval(), batch.inputs())
    chosen = batch.targets != -100
    task = torch.nn.functional.cross_entropy(logits[chosen], batch.targets[chosen])
    smoothness = logits[chosen].square().sum() / chosen.sum()
    likeness = sum((states[name] - taught[name])[batch.attend].square().mean() for name in states)
    total = task + 0.5 * smoothness + 2.0 * likeness
    total.backward()
    plain = {"loss": total.item(), "task": task.item(), "smoothness": smoothness.item(), "likeness": likeness.item()}
    expected = {name: p.grad[bits[name]] if name in bits else p.grad for name, p in student.named_parameters()}
    return metrics, gradients, plain, expected


def test_terms_of_another_package_train_beside_ours():
    with _other_package():
        loss = LossConfig(terms={"smoothness": 0.5, "likeness": 2.0})
        assert loss.needs_teacher
    metrics, gradients, plain, expected = run_ranks(_step_of_another_package, 1, loss)[0]
    assert metrics["feature"] == 0
    assert set(metrics) - set(loss.weights) < METRICS
    for name, value in plain.items():
        assert metrics[name] == pytest.approx(value, rel=1e-5), name
    assert len(gradients) == len(expected)
    for name, gradient in gradients.items():
        dense = name.removesuffix("values") + "weight" if name.endswith(".values") else name
        torch.testing.assert_close(gradient, expected[dense], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("terms", "message"), [
    ({"elsewhere": 1.0}, "there is no loss term elsewhere"), ({"task": 1.0}, "give task_weight")])
def test_terms_that_are_unknown_or_ours_are_refused(terms, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(terms=terms)


@pytest.mark.parametrize(("name", "what"), [("num_tokens", "a metric"), ("loss", "a metric"), ("epsilon", "a key")])
def test_a_term_called_like_a_metric_or_a_key_is_refused_in_one_line(name, what, monkeypatch, tmp_path):
    monkeypatch.setitem(LOSS_TERMS.entries, name, LossTermEntry(f"{__name__}:Smoothness"))
    file = tmp_path / "run.yaml"
    file.write_text(f"prune: {{sparsity: 0.5}}\nfinetune: {{losses: {{mine: {{terms: {{{name}: 1.0}}}}}}}}\n")
    with pytest.raises(UserError) as error:
        load_config(RunConfig, file)
    assert str(error.value) == (f"{file}: finetune.losses.mine.terms.{name} is called like {what} of every loss; "
                                "rename the entry point in the package that adds it")
