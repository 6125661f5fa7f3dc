"""A model with SparseLinears is written in our format whoever saves it: Hugging Face's own save_pretrained, which its
Trainer calls too, would write model.safetensors with names that every other loader skips."""

import functools
from pathlib import Path

from torch import nn

from sparse_train.errors import UserError
from sparse_train.sparse.format import write_tensors
from sparse_train.sparse.linear import sparse_linears


def save_through_us(model: nn.Module) -> None:
    """From now on `save_pretrained` of the classes in `model` asks whether there are SparseLinears.

    Classes and no instances: what is bound to an instance keeps it alive, and does not survive pickling.
    """
    for cls in {type(module) for module in model.modules()}:
        if hasattr(cls, "save_pretrained") and cls.save_pretrained is not _SAVED.get(cls):
            cls.save_pretrained = _SAVED[cls] = _asking(cls.save_pretrained)


_SAVED: dict[type, object] = {}


def _asking(original):
    @functools.wraps(original)
    def save_pretrained(self, save_directory, *args, **options):
        save = _save_sparse if sparse_linears(self) else original
        return save(self, save_directory, *args, **options)
    return save_pretrained


def _save_sparse(model, save_directory, is_main_process: bool = True, state_dict: dict | None = None,
                 push_to_hub: bool = False, *, variant: str | None = None, distributed_checkpoint: bool = False, **_):
    if push_to_hub or variant or distributed_checkpoint:
        raise UserError("a sparse model is saved into a folder, without push_to_hub, variant and "
                        "distributed_checkpoint; save it, then upload the folder")
    once = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]  # of tied tensors one
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
    write_tensors(folder, ((name, state_dict[name]) for name in once if name in state_dict),
                  {name: (linear.out_features, linear.in_features) for name, linear in sparse_linears(model).items()})
