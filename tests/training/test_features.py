"""SquareHead over less than a block, its gradient, and whose padding counts in it; in float64 as test_losses.py."""

import math

import pytest
import torch

from sparse_train.config import LossConfig
from sparse_train.training.terms.feature import FeatureTerm
from tests.ranks import run_ranks
from tests.training.plain import Float64
from tests.training.test_losses import _EXACT, B, D, T, _inputs, _loss, _squarehead, _vector


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
