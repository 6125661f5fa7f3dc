"""The terms of logits: divergences against their formulas, memory, and the positions that the output head works on.

In float64 where the inputs of test_losses.py are.
"""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparse_train.config import LossConfig
from sparse_train.tasks.batch import collate
from sparse_train.training import losses
from sparse_train.training.head import Head
from sparse_train.training.terms.logit import divergence
from tests.models import tiny_examples, tiny_model, tiny_mpt
from tests.training.test_losses import _EXACT, _inputs, _loss


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
