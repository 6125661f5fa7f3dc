"""Parts of a model without data that have it for as long as they are needed."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sparse_train import dist

Read = Callable[[str], torch.Tensor]
"""The tensor of a name in the model."""


@contextmanager
def filled(part: nn.Module, read: Read, prefix: str = "", without: Collection[nn.Module] = ()) -> Iterator[None]:
    """Inside, the tensors of `part`, the model's submodule `prefix`, are on this rank's device: those without data are
    read. Afterwards they are what they were. The modules `without`, and all below them, are left as they are.

    A tensor of several names, which tied modules share, is read once.
    """
    places: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    found: dict[int, torch.Tensor] = {}  # by the id of the tensor in the place
    for module_name, module in _below(part, prefix, set(without)):
        own: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in own:
            places += [(tensors, name, tensor) for name, tensor in tensors.items() if tensor is not None]
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in found:
                    found[id(tensor)] = _on_device(tensor, read, f"{module_name}.{name}".removeprefix("."))
    try:
        for tensors, name, tensor in places:
            tensors[name] = found[id(tensor)]
        yield
    finally:
        for tensors, name, tensor in places:
            tensors[name] = tensor


def _below(part: nn.Module, prefix: str, without: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """`part` and its submodules by their names in the model."""
    if part in without:
        return
    yield prefix, part
    for name, child in part.named_children():
        yield from _below(child, f"{prefix}.{name}".removeprefix("."), without)


def _on_device(tensor: torch.Tensor, read: Read, name: str) -> torch.Tensor:
    if tensor.device == dist.device():
        return tensor  # which may be in training
    whole = (read(name) if tensor.is_meta else tensor.detach()).to(dist.device(), tensor.dtype)
    return nn.Parameter(whole, requires_grad=False) if isinstance(tensor, nn.Parameter) else whole


@contextmanager
def filled_when_called(parts: Mapping[str, nn.Module], read: Read) -> Iterator[None]:
    """Inside, each of `parts`, by its name in the model, is `filled` while it runs."""
    def fill_and_run(name: str, part: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with filled(part, read, name):
                return forward(*args, **kwargs)
        return run

    with replaced_forwards({part: fill_and_run(name, part, part.forward) for name, part in parts.items()}):
        yield


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside, modules have these forward methods in the place of their own."""
    before = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, replaced in before.items():
            del module.forward  # that of its class is left
            if replaced is not None:
                module.forward = replaced
