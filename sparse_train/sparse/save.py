"""Writes models with SparseLinears, also where save_pretrained is called, as by Hugging Face's Trainer.

Otherwise that would write a model.safetensors with tensor names that every other loader skips.
"""

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_train import artifacts
from sparse_train.errors import UserError
from sparse_train.sparse.format import copy_tensors, write_tensors
from sparse_train.sparse.header import KEY, METHOD, PRECISIONS, SPARSE, VERSION, read_headers
from sparse_train.sparse.linear import sparse_linears


def write_sparse(folder: Path, model: Any, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write the tensors (name, tensor) of `model`, which has SparseLinears, and add `quantization_config` to the
    config.json of `folder`: the key by which other loaders see that they need sparse-train for it."""
    linears, head = sparse_linears(model), model.get_output_embeddings()
    write_tensors(folder, tensors, {name: linear.weight.shape for name, linear in linears.items()})
    stored, _ = read_headers(folder)
    name = next((name for name, linear in linears.items() if linear is not head), next(iter(linears)))
    is_single = stored[f"{name}.values"].file.name == f"{SPARSE}.safetensors"
    _extend_config(folder, {KEY: {
        "quant_method": METHOD, "version": VERSION, "precision": PRECISIONS[stored[f"{name}.values"].dtype],
        "weights": f"{SPARSE}.safetensors{'' if is_single else '.index.json'}",
        "modules_to_not_convert": [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]}})


def save_from(model: nn.Module, source: Path) -> None:
    """Make save_pretrained of `model`, whose packed weights were read from the folder `source`, copy its tensors."""
    patch_save_pretrained(model)
    for module in model.modules():
        if hasattr(module, "save_pretrained"):
            module.__dict__[_SOURCE] = source if module is model else None


def patch_save_pretrained(model: nn.Module) -> None:
    """Make `save_pretrained` of the classes in `model` write our format where a model has sparse weights.

    Classes are patched rather than instances, because a method bound to an instance keeps it alive and cannot be
    pickled.
    """
    for cls in {type(module) for module in model.modules()}:
        if hasattr(cls, "save_pretrained") and cls.save_pretrained is not _PATCHED.get(cls):
            cls.save_pretrained = _PATCHED[cls] = _with_sparse(cls.save_pretrained)


_PATCHED: dict[type, object] = {}
_SOURCE = "_sparse_train_source"
"""Attribute of a model with packed weights: the folder that they were read from; None for a part of the model."""


def _with_sparse(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def save_pretrained(self, save_directory, *args, **options):
        save = _save_sparse if sparse_linears(self) or hasattr(self, _SOURCE) else original
        return save(self, save_directory, *args, **options)
    return save_pretrained


def _save_sparse(model: Any, save_directory: str | Path, is_main_process: bool = True, state_dict: dict | None = None,
                 push_to_hub: bool = False, *, variant: str | None = None, distributed_checkpoint: bool = False,
                 **_: Any) -> None:
    if push_to_hub or variant or distributed_checkpoint:
        raise UserError("a sparse model is saved into a folder, without push_to_hub, variant and "
                        "distributed_checkpoint; save it, then upload the folder (sparse-train push)")
    is_packed = hasattr(model, _SOURCE)
    if is_packed:
        _check_source(model, state_dict)
    elif state_dict is None:
        state_dict = model.state_dict()
        if any(hasattr(tensor, "ds_id") for tensor in model.parameters()):
            raise UserError("the parameters are partitioned over ranks and empty here; give save_pretrained the "
                            "gathered state_dict")
    if not is_main_process:
        return
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    before = artifacts.read_json(getattr(model, _SOURCE) / "config.json") if is_packed else {}
    model.config.architectures = [type(model).__name__]  # by which servers choose their code
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    if is_packed:
        _extend_config(folder, {key: before[key] for key in (KEY, "dtype") if key in before}, before)
        copy_tensors(getattr(model, _SOURCE), folder)
    elif state_dict is not None:
        names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]  # tied tensors once
        write_sparse(folder, model, ((name, state_dict[name]) for name in names if name in state_dict))


def _check_source(model: Any, state_dict: dict | None) -> None:
    source = getattr(model, _SOURCE)
    if source is None:
        raise UserError(f"a {type(model).__name__} with packed weights is a part of a model; save the whole one")
    if state_dict is not None:
        raise UserError("packed weights are saved by copying the files that they were read from; leave state_dict out")
    if not source.is_dir():
        raise UserError(f"packed weights are saved by copying the files that they were read from, and {source} is gone")


def _extend_config(folder: Path, keys: dict[str, Any], defaults: dict[str, Any] | None = None) -> None:
    """Add `keys` to config.json, and of `defaults` those that it does not have."""
    file = folder / "config.json"
    artifacts.write_json(file, (defaults or {}) | artifacts.read_json(file) | keys)
