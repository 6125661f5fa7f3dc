"""Sparse folders that are made in seconds, and what the runtime of this package answers with them."""

import torch
from transformers import Phi3Config, Phi3ForCausalLM

from sparse_train.compress import export_sparse
from sparse_train.config import ModelConfig, PruneConfig
from sparse_train.inference import load
from sparse_train.models import build_model, build_processor
from sparse_train.pruning import prune
from sparse_train.sparse import sparsify
from tests.models import tiny_tokenizer

PROMPTS = [[5, 6, 7, 8, 9], [20, 21, 22], list(range(30, 50))]
NEW_TOKENS = 12


def sparse_model(family, ignore=(), **size):
    """Half of the weights of its linears are zero. Its other weights are large enough for decisive logits."""
    torch.manual_seed(0)
    if family == "phi3":  # whose files have q, k and v in one weight, and so the first two of an MLP
        model = Phi3ForCausalLM(Phi3Config(
            hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=320,
            vocab_size=300, max_position_embeddings=64, original_max_position_embeddings=64, pad_token_id=1,
            bos_token_id=0, eos_token_id=0))
    else:
        config = ModelConfig(family=family, **{"d_model": 128, "n_layers": 2, "n_heads": 4, "max_seq_len": 64} | size)
        model = build_model(config, build_processor(config, tiny_tokenizer()))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return pruned(model.eval(), ignore=list(ignore))


def pruned(model, sparsity=0.5, **keys):
    return sparsify(model, prune(model, [], PruneConfig(method="magnitude", sparsity=sparsity, **keys)))


def write(folder, model, precision, processor=None, **options):
    export_sparse(model, processor or tiny_tokenizer(), precision, folder, **options)
    return folder


def request(folder, **options):
    """For offline.py."""
    return {"model": str(folder), "prompts": PROMPTS, "new_tokens": NEW_TOKENS,
            "options": {"max_model_len": 64} | options}


@torch.no_grad()
def gap(folder, found):
    """How far tokens of vLLM are from the best ones here: the most, over positions, by which the logit of our greedy
    token is above that of vLLM's behind the same text, in standard deviations of the logits. 0: all are the same."""
    model, most = load(folder, shared=False).model, 0.0
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        assert len(tokens) == NEW_TOKENS
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1:-1].float()
        below = logits.amax(1) - logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        most = max(most, float((below / logits.std(1)).max()))
    return most


CLOSE, CLOSE_CODES = 1e-3, 0.1
"""Of a gap: rounding of FP32, and of products that quantise activations to 8 bits."""
