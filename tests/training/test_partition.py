"""The partition of a large model over more ranks than there are machines here."""

import time

import pytest
import torch
from transformers import MptConfig, MptForCausalLM

from sparse_train.training.partition import (
    GRADIENT_BYTES,
    MASTER_BYTES,
    MOMENT_BYTES,
    WEIGHT_BYTES,
    entries_per_rank,
    part,
    sparse_sizes,
)


def test_mpt_30b_over_1024_ranks_is_balanced_and_owned_once(capsys):
    started = time.monotonic()
    with torch.device("meta"):
        model = MptForCausalLM(MptConfig(d_model=7168, n_heads=64, n_layers=48, vocab_size=50432))
    values, bits = sparse_sizes(model, 0.75)
    num_values, num_bits = entries_per_rank(values, 1024), entries_per_rank(bits, 1024)
    assert num_values.sum() == sum(values.values()) and num_bits.sum() == sum(bits.values())
    for owned in (num_values, num_bits):
        assert owned.max() <= 1.01 * owned.double().mean() and owned.min() >= 0.99 * owned.double().mean()
    bytes_per_value = WEIGHT_BYTES["bf16"] + MASTER_BYTES + MOMENT_BYTES + GRADIENT_BYTES
    per_rank = num_values.max() * bytes_per_value + num_bits.max()
    with capsys.disabled():
        print(f"\nMPT-30B at 75%, 1024 ranks: {num_values.max()} values and {num_bits.max()} bytes of bits per rank, "
              f"{per_rank / 1e6:.1f} MB of training state")
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("numel", [0, 1, 5, 1023, 1024, 1025, 10**6 + 7])
@pytest.mark.parametrize("num_ranks", [1, 3, 1024])
def test_parts_cover_a_tensor_once(numel, num_ranks):
    found = [entry for rank in range(num_ranks) for entry in range(*part(numel, rank, num_ranks))]
    assert found == list(range(numel))
