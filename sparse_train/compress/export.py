"""Model folders for use outside of a run.

    export_sparse   values and bits, fp32, bf16, int8 or int4: read by sparse_train.inference
    export_dense    Hugging Face's layout with every zero in place: read by from_pretrained anywhere
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from sparse_train import artifacts
from sparse_train.compress.quantise import QUANTISERS, Codes, quantise_rows
from sparse_train.errors import UserError
from sparse_train.models import DTYPES, Processor, open_model, own_tensors, save_model
from sparse_train.sparse import BitmaskTensor, densify, pack_nibbles, replace_module, sparse_linears, sparsify


def export_sparse(model: PreTrainedModel, processor: Processor, precision: str, folder: Path,
                  int8_head: bool = False, rounded: Mapping[str, Codes] | None = None) -> None:
    """Write `model` (with SparseLinears) at `precision`; int8 and int4 quantise the sparse weights and leave the rest
    fp32.

    `int8_head`: they quantise the output head as well, to int8, as a weight that keeps every position; the embedding
    that may be tied to it stays. `rounded`: codes and scales of the sparse weights by module name, as from
    round_compensated, in place of rounding to nearest. Raises UserError where the model has no head that is a linear.
    """
    is_quantised = precision in QUANTISERS
    if is_quantised and rounded is None:
        rounded = {name: QUANTISERS[precision].nearest(linear.weight)
                   for name, linear in sparse_linears(model).items()}
    with _with_whole_head(model) if int8_head and is_quantised else contextlib.nullcontext() as head:
        tensors = dict(own_tensors(model))
        if rounded is not None:
            for name, linear in sparse_linears(model).items():
                codes, scale = quantise_rows(linear.weight) if name == head else rounded[name]
                tensors[f"{name}.scale"] = scale
                tensors[f"{name}.values"] = codes.values if scale.ndim == 1 else pack_nibbles(codes.values)
        else:
            tensors = {name: tensor.to(DTYPES[precision]) if tensor.is_floating_point() else tensor
                       for name, tensor in tensors.items()}
        save_model(folder, model, processor, tensors.items())
        artifacts.sign(folder, {"precision": precision, "sparse_weights": {
            name: {"shape": list(linear.weight.shape), "sparsity": linear.weight.sparsity}
            for name, linear in sparse_linears(model).items()}})


@contextlib.contextmanager
def _with_whole_head(model: PreTrainedModel) -> Iterator[str]:
    """The output head, whose name this gives, is a SparseLinear without a zero, meanwhile."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UserError(f"compress.int8_head=true: a {model.config.model_type} model has no output head that is a "
                        "linear; leave it false")
    name = next(name for name, module in model.named_modules() if module is head)
    weight = head.weight.detach()
    sparsify(model, {name: BitmaskTensor.from_dense(weight, torch.ones_like(weight, dtype=torch.bool))})
    try:
        yield name
    finally:
        replace_module(model, name, head)


def export_dense(model: PreTrainedModel, processor: Processor, folder: Path) -> None:
    """Write `model` in Hugging Face's layout; its SparseLinears become linears in place."""
    save_model(folder, densify(model), processor)


def unpruned_zeros(folder: Path, weights: dict[str, BitmaskTensor]) -> list[str]:
    """Check a dense export: names of weights with a non-zero at a pruned position, or a kept value that changed."""
    (_, tensors), wrong = open_model(folder), []
    for name, weight in weights.items():
        dense = tensors.get(f"{name}.weight")
        if dense[~weight.keep].any() or not torch.equal(dense[weight.keep], weight.values):
            wrong.append(name)
    return wrong
