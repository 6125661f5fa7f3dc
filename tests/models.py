"""Models small enough for tests."""

import functools

import numpy as np
import torch
from transformers import MptConfig, MptForCausalLM

from sparse_train.config import ModelConfig, TaskConfig
from sparse_train.models import build_model, build_processor
from sparse_train.tasks import Example, build_task, build_tokenizer


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


def tiny_model(family, **size):
    """(a new model of `family` in eval mode, its processor)."""
    torch.manual_seed(0)
    config = ModelConfig(**{"family": family, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64,
                            "window_seconds": 0.4, **size})
    processor = build_processor(config, tiny_tokenizer())
    return build_model(config, processor).eval(), processor


def tiny_examples(processor):
    """Four of different lengths, of text or of noise."""
    random = np.random.default_rng(0)
    examples = []
    for index, text in enumerate(("one two", "three", "four five six seven", "8")):
        audio = random.standard_normal(1600 + 800 * index).astype(np.float32)
        sound = functools.partial(_same, audio) if processor.features else None
        examples.append(Example(f"Say {text}", f" {text} 1 2", sound))
    return examples


def _same(audio, rate):
    return audio
