"""Sparse weights in safetensors files.

    sparse.safetensors (or sparse-00001-of-0000N.safetensors with sparse.safetensors.index.json)
        NAME.values    (nnz,)   kept entries, row-major: float32, bfloat16, float16 or int8
        NAME.bitmask   (R, 8 * ceil(C / 64)) uint8
        NAME.scale     (R,)     float32, with int8 values only: weight = value * scale of its row
        every other tensor under its own name
        header: "sparse_train" = {"version": 1, "shapes": {NAME: [R, C]}}
    model.safetensors (...) for a model without sparse weights: the usual Hugging Face layout

NAME is the linear's module name, so tensor names are those of a state dict with SparseLinears. The file is not called
model.safetensors because other loaders would skip the names they do not know and leave those weights random.
"""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from sparse_train import kernels
from sparse_train.errors import UserError
from sparse_train.sparse.bitmask import BitmaskTensor

_HEADER = "sparse_train"
_VERSION = 1
_SPARSE, _DENSE = "sparse", "model"
_FILE_BYTES = 1_000_000_000
PARTS = ("values", "bitmask", "scale")


def write_tensors(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]],
                  shapes: Mapping[str, tuple[int, int]]) -> None:
    """Write a model's tensors as they come, holding one file's worth (1 GB or the largest tensor) at a time.

    `shapes` gives (R, C) of each sparse weight and is empty for a dense model.
    """
    # One entry: safetensors writes several in random order, and the same weights shall be the same bytes.
    metadata = {"format": "pt"} if not shapes else {
        _HEADER: json.dumps({"version": _VERSION, "shapes": {name: list(s) for name, s in shapes.items()}})}
    stem = _SPARSE if shapes else _DENSE
    parts: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}

    def flush():
        parts.append(list(pending))
        save_file(pending, folder / f"{stem}.{len(parts)}.part", metadata)
        pending.clear()

    total = 0
    for name, tensor in tensors:
        if pending and sum(t.nbytes for t in pending.values()) + tensor.nbytes > _FILE_BYTES:
            flush()
        pending[name] = tensor.detach().cpu().contiguous()
        total += tensor.nbytes
    flush()
    files = [f"{stem}.safetensors" if len(parts) == 1 else f"{stem}-{i:05}-of-{len(parts):05}.safetensors"
             for i in range(1, len(parts) + 1)]
    for number, file in enumerate(files, 1):
        (folder / f"{stem}.{number}.part").rename(folder / file)
    if len(parts) > 1:
        weight_map = {name: file for file, names in zip(files, parts, strict=True) for name in names}
        (folder / f"{stem}.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1),
            encoding="utf-8")


class TensorFolder:
    """The tensors of a checkpoint folder, dense or sparse, read one by one. Raises UserError where there is none.

    `names`: tensors outside the sparse weights. `shapes`: (R, C) of each sparse weight.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, int]] = {}
        for file in self._list():
            self._read_header(file)
        parts = {f"{name}.{part}" for name in self.shapes for part in PARTS}
        self.names = [name for name in self._files if name not in parts]
        for name in self.shapes:
            self._check(name)

    def _list(self) -> list[Path]:
        for stem in (_SPARSE, _DENSE):
            index = self.folder / f"{stem}.safetensors.index.json"
            if index.is_file():
                files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
                return [self.folder / name for name in sorted(files)]
            single = self.folder / f"{stem}.safetensors"
            if single.is_file():
                return [single]
        raise UserError(f"{self.folder} is no checkpoint: it holds neither {_SPARSE}.safetensors nor "
                        f"{_DENSE}.safetensors; give the folder that a stage or save_pretrained wrote")

    def _read_header(self, file: Path) -> None:
        try:
            with safe_open(file, "pt") as opened:
                header = json.loads((opened.metadata() or {}).get(_HEADER, '{"version": 1, "shapes": {}}'))
                self._files.update(dict.fromkeys(opened.keys(), file))
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise UserError(f"{file} is damaged or no safetensors file: {error}") from error
        if header["version"] != _VERSION:
            raise UserError(f"{file} has format version {header['version']}, this release reads {_VERSION}; update")
        self.shapes.update({name: tuple(shape) for name, shape in header["shapes"].items()})

    def _check(self, name: str) -> None:
        missing = [part for part in ("values", "bitmask") if f"{name}.{part}" not in self._files]
        if missing:
            raise UserError(f"{self.folder}: {name}.{missing[0]} is missing; the checkpoint is not complete")

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def spec(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and safetensors dtype (F32, BF16, I8, ...) of a stored tensor, without reading it."""
        with safe_open(self._files[name], "pt") as opened:
            view = opened.get_slice(name)
            return tuple(view.get_shape()), view.get_dtype()

    def get(self, name: str) -> torch.Tensor:
        with safe_open(self._files[name], "pt") as opened:
            return opened.get_tensor(name)

    def get_range(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Entries start..stop-1 of the flattened tensor, read without the rest of it (whole rows of it apart)."""
        with safe_open(self._files[name], "pt") as opened:
            view = opened.get_slice(name)
            shape = view.get_shape()
            row = math.prod(shape[1:])
            first = start // row
            rows = view[first:-(-stop // row)] if start < stop else view[0:0]
            return rows.flatten()[start - first * row:stop - first * row].clone()

    def weight(self, name: str) -> BitmaskTensor:
        """The sparse weight `name`; its bits and its values are checked against each other and the shape."""
        shape = self.shapes[name]
        weight = BitmaskTensor(self.get(f"{name}.values"), self.get(f"{name}.bitmask"), shape)
        words = (shape[0], 8 * -(-shape[1] // 64))
        if tuple(weight.bitmask.shape) != words or weight.bitmask.dtype != torch.uint8:
            raise UserError(f"{self.folder}: {name}.bitmask has shape {tuple(weight.bitmask.shape)}, a weight of shape "
                            f"{shape} needs uint8 {words}; the file is damaged")
        num_kept = int(kernels.unpack(weight.bitmask, shape[1]).sum())
        if num_kept != weight.values.numel():
            raise UserError(f"{self.folder}: {name} keeps {num_kept} positions by its bits but has "
                            f"{weight.values.numel()} values; the file is damaged")
        return weight

    def scale(self, name: str) -> torch.Tensor | None:
        """(R,) float32 for int8 values, else None."""
        return self.get(f"{name}.scale") if f"{name}.scale" in self else None
