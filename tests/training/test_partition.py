"""The partition of a large model over more ranks than there are machines here."""

import time

import pytest
import torch
from transformers import MptConfig, MptForCausalLM

from sparse_train.models import family_of
from sparse_train.training.partition import shard_bounds

_NUM_RANKS, _SPARSITY = 1024, 0.75


def _sizes():
    """Entries of each trained parameter, and bytes of the bits of each sparse weight, of MPT-30B."""
    with torch.device("meta"):
        model = MptForCausalLM(MptConfig(d_model=7168, n_heads=64, n_layers=48, vocab_size=50432))
    linears = family_of(model).prunable_linears(model)
    values = [p.numel() for name, p in model.named_parameters() if name.removesuffix(".weight") not in linears]
    shapes = [linear.weight.shape for linear in linears.values()]
    values += [round((1 - _SPARSITY) * rows * columns) for rows, columns in shapes]
    return values, [rows * 8 * -(-columns // 64) for rows, columns in shapes]


def test_mpt_30b_over_1024_ranks_is_balanced_and_owned_once():
    started = time.monotonic()
    for sizes in _sizes():
        bounds = torch.tensor([[shard_bounds(numel, rank, _NUM_RANKS) for rank in range(_NUM_RANKS)]
                               for numel in sizes])
        starts, stops = bounds.unbind(-1)
        assert not starts[:, 0].any() and torch.equal(stops[:, -1], torch.tensor(sizes))
        assert torch.equal(starts[:, 1:], stops[:, :-1])
        owned = (stops - starts).sum(0).double()
        assert owned.max() <= 1.01 * owned.mean() and owned.min() >= 0.99 * owned.mean()
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("numel", [0, 1, 5, 1023, 1024, 1025, 10**6 + 7])
@pytest.mark.parametrize("num_ranks", [1, 3, 1024])
def test_parts_cover_a_tensor_once(numel, num_ranks):
    entries = [entry for rank in range(num_ranks) for entry in range(*shard_bounds(numel, rank, num_ranks))]
    assert entries == list(range(numel))
