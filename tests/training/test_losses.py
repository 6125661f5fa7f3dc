"""The losses against what PAPER's equations say, computed in loops, and against any way of splitting a batch."""

import math

import pytest
import torch

from sparse_train.config import LossConfig
from sparse_train.training.losses import FeatureSums, distillation_loss, next_tokens, squarehead
from tests.ranks import run_ranks

B, T, D, V, L = 4, 6, 8, 11, 3
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
    sums = FeatureSums(config) if config.feature_weight else None
    if sums:
        for s, t in zip(features, taught, strict=True):
            sums.add(s, t, attend)
    return distillation_loss(config, logits, next_tokens(labels), sums, teacher_logits, labels)


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
    assert shares.task.item() == pytest.approx(task, rel=1e-5)
    assert shares.logit.item() == pytest.approx(logit, rel=1e-5)
    assert shares.feature.tolist() == pytest.approx(terms, rel=1e-5)
    assert shares.loss.item() == pytest.approx(0.7 * task + 0.4 * logit + 1.3 * sum(terms), rel=1e-5)
    assert squarehead(inputs[3], inputs[4], inputs[2]).tolist() == pytest.approx(terms, rel=1e-5)


def test_what_stands_at_padding_changes_nothing():
    logits, labels, attend, features, taught, teacher_logits = _inputs()
    spoilt = [torch.where(attend[..., None], f, torch.full_like(f, 1e6)) for f in features]
    before = _loss(_LOSS, logits, labels, attend, features, taught, teacher_logits)
    after = _loss(_LOSS, logits, labels, attend, spoilt, taught, teacher_logits)
    assert torch.equal(before.loss, after.loss)


def test_weights_select_the_terms():
    logits, labels, attend, features, taught, _ = _inputs()
    plain = _loss(LossConfig(), logits, labels, attend)
    assert plain.feature.numel() == 0 and plain.logit == 0
    torch.testing.assert_close(plain.loss, plain.task)
    assert _loss(LossConfig(task_weight=0, feature_weight=1.0), logits, labels, attend, features,
                             taught).loss.item() == pytest.approx(
        squarehead(features, taught, attend).sum().item(), rel=1e-6)


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
    return shares.detached(), leaf.grad


@pytest.mark.parametrize("splits", [([0, 1, 2, 3], []), ([0], [1, 2, 3]), ([2], [0, 1, 3])], ids=str)
def test_shares_over_ranks_add_up_to_the_whole_batch(splits):
    inputs = _inputs()
    leaf = inputs[0].clone().requires_grad_()
    whole = _loss(_LOSS, leaf, *inputs[1:])
    whole.loss.backward()
    ranks = run_ranks(_share, 2, splits)
    torch.testing.assert_close(sum(terms for terms, _ in ranks), whole.detached(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(sum(grad for _, grad in ranks), leaf.grad, rtol=1e-6, atol=1e-8)
