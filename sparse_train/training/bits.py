"""The bits of sparse weights do not change in a training, and every rank has the same."""

import hashlib
from pathlib import Path

import torch
from torch import nn

from sparse_train import dist
from sparse_train.compat.deepspeed import local_part
from sparse_train.sparse import TensorFolder, sparse_linears
from sparse_train.training.gather import gathered


def digest_bits(model: nn.Module) -> dict[str, str]:
    """Module name of each sparse weight -> sha256 of its bits.

    Collective. Raises RuntimeError, on every rank, where ranks differ. An engine gives all ranks the values of rank 0,
    so this must be called before one is made.
    """
    digests = {}
    for name, linear in sparse_linears(model).items():
        with gathered(linear.bitmask):
            digests[name] = _digest(linear.bitmask)
    dist.require_agreement("the bits of sparse weights", digests)
    return digests


class FrozenBits:
    """Watches what this rank holds of the bits of a model whose engine has been made."""

    def __init__(self, model: nn.Module, digests: dict[str, str]):
        self._linears = sparse_linears(model)
        self.digests = digests
        """digest_bits of the model."""
        self._local_digests = self._digest_local_parts()

    def check(self) -> None:
        """Collective. Raises RuntimeError, on every rank, with the tensor and the ranks whose bits have changed."""
        current = self._digest_local_parts()
        changed = dist.gather_objects([name for name in current if current[name] != self._local_digests[name]])
        for name in self._linears:
            ranks = [rank for rank, names in enumerate(changed) if name in names]
            if ranks:
                raise RuntimeError(f"the bits of {name} have changed since the start on ranks {ranks}")

    def _digest_local_parts(self) -> dict[str, str]:
        return {name: _digest(local_part(linear.bitmask)) for name, linear in self._linears.items()}


def audit(path: Path, digests: dict[str, str]) -> None:
    """Compare the sparse weights in the folder `path` with the digests of those that were trained.

    Raises RuntimeError where they differ. Reading checks that values are finite and as many as the bits.
    """
    folder = TensorFolder(path)
    if folder.shapes.keys() != digests.keys():
        raise RuntimeError(f"{path} holds {len(folder.shapes)} sparse weights, the model {len(digests)}")
    for name in folder.shapes:
        if _digest(folder.weight(name).bitmask) != digests[name]:
            raise RuntimeError(f"{path}: the bits of {name} are not those that were trained with")


def _digest(bitmask: torch.Tensor) -> str:
    return hashlib.sha256(bitmask.detach().cpu().numpy().tobytes()).hexdigest()
