"""The losses against what PAPER's equations say, computed in loops, and against any way of splitting a batch.

In float64 throughout (plain.Float64), so that what is left of a difference is a fault of the formula.
"""

import contextlib
import math
from dataclasses import replace
from importlib.metadata import EntryPoint

import pytest
import torch

from sparse_train import registry
from sparse_train.config import LossConfig, RunConfig, TrainConfig, ZeroConfig
from sparse_train.config.load import load_config
from sparse_train.config.loss import METRICS
from sparse_train.errors import UserError
from sparse_train.registry import LOSS_TERMS, LossTermEntry
from sparse_train.sparse import densify, sparse_linears
from sparse_train.training import step
from sparse_train.training.losses import new_terms, weighted_loss
from sparse_train.training.metrics import Meter
from sparse_train.training.terms import LossTerm, ModelOutputs, Ratio
from sparse_train.training.terms.feature import squarehead
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


def test_the_ast_preset_is_the_formula_of_its_code():
    logits, labels, attend, _, _, teacher_logits = _inputs()
    shares = _loss(LossConfig(preset="ast"), logits, labels, attend, teacher_logits=teacher_logits)
    chosen = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    s, t = (x[chosen != -100] for x in (logits, teacher_logits))
    task = torch.nn.functional.cross_entropy(s, chosen[chosen != -100])
    kl = torch.nn.functional.kl_div((s / 2).log_softmax(-1), (t / 2).log_softmax(-1), reduction="batchmean",
                                    log_target=True) * 4
    torch.testing.assert_close(shares.loss, 0.33 * task + 0.67 * kl, rtol=_EXACT, atol=0)


def test_the_preset_of_our_own_is_a_ratio_per_token_beside_cross_entropy():
    assert LossConfig(preset="token") == LossConfig(preset="token", task_weight=1.0, logit_weight=0.0,
                                                    feature_weight=0.562, feature_ratio="token", normalise="global")


def test_keys_beside_a_preset_win():
    config = LossConfig(preset="paper-whisper", task_weight=0.9, layers=[1, 2])
    assert config.task_weight == 0.9 and config.layers == (1, 2) and config.epsilon == 1e-8


def test_the_key_that_older_runs_hold_is_read_under_its_new_name():
    assert LossConfig(preset="paper-mpt") == LossConfig(preset="paper-mpt", final_feature="norm")
    assert LossConfig(preset="paper-mpt", final_feature="block").features == "blocks"
    assert LossConfig(feature_weight=1.0, final_feature="norm").features == "final_norm"
    assert LossConfig(feature_weight=1.0, final_feature="block", features="norms").features == "norms"
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
