"""Models small enough for tests."""

import functools

import torch
from transformers import MptConfig, MptForCausalLM

from sparse_train.config import TaskConfig
from sparse_train.tasks import build_task, build_tokenizer


def tiny_mpt(d_model=32, n_layers=2, vocab_size=50, **extra):
    """Weights drawn from torch's global generator, scaled up so that attention and logits are decisive."""
    model = MptForCausalLM(MptConfig(d_model=d_model, n_heads=2, n_layers=n_layers, vocab_size=vocab_size,
                                     max_seq_len=64, **extra))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return model


@functools.cache
def tiny_tokenizer():
    return build_tokenizer(build_task(TaskConfig()), 300)
