"""Decoders of known sizes with random weights, dense and sparse, to be measured: speed does not depend on values."""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import get_args

import torch
from transformers import PreTrainedTokenizerBase

from sparse_train.compress import export_sparse
from sparse_train.config import ModelConfig, TaskConfig
from sparse_train.config.run import CompressConfig
from sparse_train.inference import Runtime, load
from sparse_train.models import describe, family_of, load_model, load_processor, save_model
from sparse_train.models.empty import from_config
from sparse_train.sparse import BitmaskTensor, sparsify
from sparse_train.tasks import build_task, build_tokenizer

PRECISIONS: tuple[str, ...] = get_args(get_args(CompressConfig.model_fields["precisions"].annotation)[0])

SHAPES = {
    "mpt-506m": ModelConfig(family="mpt", d_model=2048, n_layers=8, n_heads=16, max_seq_len=2048, vocab_size=50368),
    "mpt-7b-block": ModelConfig(family="mpt", d_model=4096, n_layers=1, n_heads=32, max_seq_len=2048, vocab_size=512),
    "llama-8b-block": ModelConfig(family="llama", d_model=4096, n_layers=1, n_heads=32, n_kv_heads=8, d_ff=14336,
                                  max_seq_len=2048, vocab_size=512),
}
"""Blocks have next to no vocabulary, so that the head counts for little."""


def build_dense(name: str, folder: Path) -> None:
    """Write the dense model of SHAPES to `folder`."""
    torch.manual_seed(0)
    save_model(folder, from_config(describe(SHAPES[name])), shape_tokenizer())


def shape_tokenizer() -> PreTrainedTokenizerBase:
    """Of 300 tokens, which models of all shapes have."""
    return build_tokenizer(build_task(TaskConfig()), 300)


def sparse_runtimes(dense: Path, sparsities: Iterable[float]) -> Iterator[Runtime]:
    """The model of the folder `dense` at each sparsity, in every precision, a quantised one with a quantised head."""
    for sparsity in sparsities:
        model = load_model(dense)
        generator = torch.Generator().manual_seed(1)
        weights = {name: model.get_parameter(f"{name}.weight").detach()
                   for name in family_of(model).prunable_linears(model)}
        sparsify(model, {name: BitmaskTensor.from_dense(
            weight, torch.rand(weight.shape, generator=generator) >= sparsity) for name, weight in weights.items()})
        for precision in PRECISIONS:
            with tempfile.TemporaryDirectory(dir=dense.parent) as folder:
                export_sparse(model, load_processor(dense), precision, Path(folder), int8_head=True)
                yield load(folder, shared=False)
