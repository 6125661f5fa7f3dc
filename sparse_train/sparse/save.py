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
from sparse_train.sparse.format import write_tensors
from sparse_train.sparse.header import METHOD, PRECISIONS, VERSION, read_headers
from sparse_train.sparse.linear import sparse_linears


def write_sparse(folder: Path, model: Any, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write the tensors (name, tensor) of `model`, which has SparseLinears, and add `quantization_config` to the
    config.json of `folder`: the key by which other loaders see that they need sparse-train for it."""
    linears, head = sparse_linears(model), model.get_output_embeddings()
    write_tensors(folder, tensors, {name: linear.weight.shape for name, linear in linears.items()})
    stored, _ = read_headers(folder)
    name = next((name for name, linear in linears.items() if linear is not head), next(iter(linears)))
    config = folder / "config.json"
    artifacts.write_json(config, artifacts.read_json(config) | {"quantization_config": {
        "quant_method": METHOD, "version": VERSION, "precision": PRECISIONS[stored[f"{name}.values"].dtype],
        "modules_to_not_convert": [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]}})


def patch_save_pretrained(model: nn.Module) -> None:
    """Make `save_pretrained` of the classes in `model` write our format where a model has SparseLinears.

    Classes are patched rather than instances, because a method bound to an instance keeps it alive and cannot be
    pickled.
    """
    for cls in {type(module) for module in model.modules()}:
        if hasattr(cls, "save_pretrained") and cls.save_pretrained is not _PATCHED.get(cls):
            cls.save_pretrained = _PATCHED[cls] = _with_sparse(cls.save_pretrained)


_PATCHED: dict[type, object] = {}


def _with_sparse(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def save_pretrained(self, save_directory, *args, **options):
        save = _save_sparse if sparse_linears(self) else original
        return save(self, save_directory, *args, **options)
    return save_pretrained


def _save_sparse(model: Any, save_directory: str | Path, is_main_process: bool = True, state_dict: dict | None = None,
                 push_to_hub: bool = False, *, variant: str | None = None, distributed_checkpoint: bool = False,
                 **_: Any) -> None:
    if push_to_hub or variant or distributed_checkpoint:
        raise UserError("a sparse model is saved into a folder, without push_to_hub, variant and "
                        "distributed_checkpoint; save it, then upload the folder")
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]  # tied tensors once
    if state_dict is None:
        state_dict = model.state_dict()
        if any(hasattr(tensor, "ds_id") for tensor in model.parameters()):
            raise UserError("the parameters are partitioned over ranks and empty here; give save_pretrained the "
                            "gathered state_dict")
    if not is_main_process:
        return
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    write_sparse(folder, model, ((name, state_dict[name]) for name in names if name in state_dict))
