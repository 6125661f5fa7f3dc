"""The formats of sparse weights that compressed-tensors wrote up to 0.14, and that nothing reads since then.

In place of P.weight, of shape (R, C) and kept at nnz positions, a file holds:

    sparse-bitmask       P.compressed   (nnz,)    kept values, row after row
                         P.bitmask      (R, ceil(C / 8)) uint8: bit k % 8 of byte k // 8 says that column k is kept
                         P.row_offsets  (R,)      int64, the place in `compressed` at which each row starts; not read
                         P.shape        (2,)      int64
    sparse-24-bitmask    P.compressed   (R, C / 2): the two entries of each four columns whose size is largest, so that
                                        some of them may be 0
                         P.bitmask      as above
                         P.shape        (2, 1)    int64

So their values are ours and their bits are too, but that our rows are padded to 64 bits. Releases before 0.9 put the
tensor's own name in P's place, and every release may have packed vectors and embeddings as well, as one row or many.
`marlin-24` is weights of four or eight bits in the order in which one GPU kernel reads them.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional

from sparse_train.errors import UserError
from sparse_train.importers.importer import Importer, dtype_of
from sparse_train.models import (
    ModelFolder,
    fetch,
    load_processor,
    model_of,
    packed_format,
    read_config,
    read_config_keys,
)
from sparse_train.sparse import BitmaskTensor, TensorFolder, count_bits

_PARTS = ("compressed", "bitmask", "shape", "row_offsets")
_MOST_DIMENSIONS = 4


class _Packed(NamedTuple):
    stem: str
    """What the names of its parts start with."""
    shape: tuple[int, ...]


class _UnpackedTensors(TensorFolder):
    """The tensors of such a folder under their names and with their shapes in the dense model."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        stems = [name.removesuffix(".compressed") for name in self.names if name.endswith(".compressed")]
        self._packed = {_dense_name(stem): _Packed(stem, self._shape(stem)) for stem in stems}
        parts = {f"{stem}.{part}" for stem in stems for part in _PARTS}
        self.names = [*self._packed, *(name for name in self.names if name not in parts)]

    def spec(self, name: str) -> tuple[tuple[int, ...], str]:
        if name not in self._packed:
            return super().spec(name)
        return self._packed[name].shape, super().spec(f"{self._packed[name].stem}.compressed")[1]

    def get(self, name: str) -> torch.Tensor:
        if name not in self._packed:
            return super().get(name)
        return self._unpack(name).to_dense().view(self._packed[name].shape)

    def _unpack(self, name: str) -> BitmaskTensor:
        """A packed tensor as a matrix. Raises UserError where its parts do not belong together."""
        stem, shape = self._packed[name]
        values, bitmask = super().get(f"{stem}.compressed").flatten(), super().get(f"{stem}.bitmask")
        bitmask = bitmask.reshape(-1, bitmask.shape[-1])
        bitmask = functional.pad(bitmask, (0, -bitmask.shape[1] % 8))
        num_kept = count_bits(bitmask, shape[-1], f"{self.folder}: {stem}.bitmask")
        if num_kept != len(values):
            raise UserError(f"{self.folder}: {stem} keeps {num_kept} positions by its bits but has {len(values)} "
                            "values; the file is damaged")
        return BitmaskTensor(values, bitmask, (len(bitmask), shape[-1]))

    def _shape(self, stem: str) -> tuple[int, ...]:
        """Of the dense tensor. Raises UserError where there is none, or another than that of its bits."""
        for part in ("shape", "bitmask"):
            if f"{stem}.{part}" not in self:
                raise UserError(f"{self.folder}: {stem}.{part} is missing; the checkpoint is not complete")
        stored, dtype = super().spec(f"{stem}.shape")
        shape: tuple[int, ...] = ()
        if math.prod(stored) <= _MOST_DIMENSIONS and dtype == "I64":
            shape = tuple(super().get(f"{stem}.shape").flatten().tolist())
        bits = super().spec(f"{stem}.bitmask")
        if not shape or min(shape) < 1 or bits != ((*shape[:-1], -(-shape[-1] // 8)), "U8"):
            raise UserError(f"{self.folder}: {stem}.bitmask is {bits[1]} {bits[0]}, which are not the bits of a tensor "
                            f"of shape {shape}; the file is damaged")
        return shape


def _dense_name(stem: str) -> str:
    return stem if stem.endswith((".weight", ".bias")) else f"{stem}.weight"


class _UnpackedModel(ModelFolder, _UnpackedTensors):
    """Its tensors under their names in the model, whatever the model's type had for names when they were stored."""

    def packed_weight(self, name: str) -> BitmaskTensor | None:
        """The tensor `name` of the model as a matrix with bits, where the file has it so."""
        source = self._sources.get(name)
        if source is None or source.conversion is not None or source.name not in self._packed:
            return None
        return self._unpack(source.name)


class CompressedTensors(Importer):
    has_bits = True

    def __init__(self, source: str):
        if packed_format(read_config_keys(source)) == "marlin-24":
            raise UserError(f"{source} is marlin-24, weights of few bits in the order of one GPU kernel, which "
                            "compressed-tensors itself cannot read back; give the checkpoint that it was made from")
        config, folder = read_config(source, packed=True), _UnpackedModel(fetch(source))
        self.model, self.folder = model_of(folder, config, dtype_of(config)), folder
        self.processor, self._packed_weight = load_processor(source, packed=True), folder.packed_weight

    @classmethod
    def recognises(cls, source: str, config: Mapping[str, Any]) -> bool:
        return packed_format(config) is not None

    def weight(self, linear: str) -> BitmaskTensor:
        return self._packed_weight(f"{linear}.weight") or super().weight(linear)
