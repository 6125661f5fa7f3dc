"""Sparse weights in safetensors files.

    sparse.safetensors (or sparse-00001-of-0000N.safetensors with sparse.safetensors.index.json)
        NAME.values    (nnz,)   kept entries, row-major: float32, bfloat16, float16 or int8
                       (ceil(nnz / 2),) uint8: codes -8..7, two in a byte, the first in its low half
        NAME.bitmask   (R, 8 * ceil(C / 64)) uint8
        NAME.scale     (R,)     float32, with int8 values only: weight = value * scale of its row
                       (R, ceil(C / 128)) bfloat16, with codes of four bits: weight = code * scale of its 128 columns
        every other tensor under its usual name
        header: "sparse_train" = {"version": 1, "shapes": {NAME: [R, C]}}
    model.safetensors (...) for a model without sparse weights: the usual Hugging Face layout

A sparse weight keeps at least one value: ZeRO-3 cannot partition a parameter without entries.

NAME is the linear's module name, so tensor names are those of a state dict with SparseLinears. The file is not called
model.safetensors because other loaders would skip the names they do not know and leave those weights random.
"""

import json
import math
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors import torch as safetensors
from torch.nn import functional

from sparse_train import kernels
from sparse_train.errors import UserError
from sparse_train.sparse.bitmask import BitmaskTensor
from sparse_train.sparse.header import DENSE, HEADER, INT4, PARTS, SPARSE, VERSION, read_headers
from sparse_train.sparse.stored import multiply_out

_FILE_BYTES = 1_000_000_000
_OURS = re.compile(rf"({SPARSE}|{DENSE})(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?")


def save_file(tensors: dict[str, torch.Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """As safetensors' save_file, but with the permissions of the umask, where safetensors gives none to others."""
    file.touch()
    mode = file.stat().st_mode
    safetensors.save_file(tensors, file, metadata)
    file.chmod(mode)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Codes (nnz,) int8 in -8..7 -> (ceil(nnz / 2),) uint8."""
    nibbles = functional.pad(codes & 15, (0, len(codes) % 2)).to(torch.uint8)
    return nibbles[::2] | nibbles[1::2] << 4


def unpack_nibbles(packed: torch.Tensor, num_codes: int) -> torch.Tensor:
    """The inverse of pack_nibbles."""
    packed = packed.view(torch.int8)
    return torch.stack([packed << 4 >> 4, packed >> 4], 1).flatten()[:num_codes]


def write_tensors(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]],
                  shapes: Mapping[str, tuple[int, int]]) -> None:
    """Write a model's tensors in their order; one file's worth (1 GB or the largest tensor) is in memory at a time.

    `shapes` gives (R, C) of each sparse weight and is empty for a dense model. The tensor files of another model in the
    folder are deleted once these are complete.
    """
    # One entry: safetensors writes several in random order, and equal weights must give equal bytes.
    metadata = {"format": "pt"} if not shapes else {
        HEADER: json.dumps({"version": VERSION, "shapes": {name: list(s) for name, s in shapes.items()}})}
    stem = SPARSE if shapes else DENSE
    parts: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}

    def flush() -> None:
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
        files.append(f"{stem}.safetensors.index.json")
        (folder / files[-1]).write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1), encoding="utf-8")
    _remove_others(folder, files)


def copy_tensors(source: Path, folder: Path) -> None:
    """Copy the tensor files of `source`; then delete those of another model in `folder`."""
    files = [path.name for path in source.iterdir() if _OURS.fullmatch(path.name)]
    for name in () if folder.exists() and folder.samefile(source) else files:
        aside = folder / f"{name}.part"
        shutil.copyfile(source / name, aside)
        aside.rename(folder / name)
    _remove_others(folder, files)


def _remove_others(folder: Path, files: Iterable[str]) -> None:
    for path in list(folder.iterdir()):
        if _OURS.fullmatch(path.name) and path.name not in files:
            path.unlink()


def count_bits(bitmask: torch.Tensor, num_columns: int, what: str) -> int:
    """How many of the bits of a BitmaskTensor are set. Raises UserError, naming `what`, where some lie behind the last
    column."""
    if kernels.unpack(bitmask[:, -8:], 64)[:, (num_columns - 1) % 64 + 1:].any():
        raise UserError(f"{what} has bits behind its {num_columns} columns; the file is damaged")
    return int(np.bitwise_count(bitmask.numpy().view(np.uint64)).sum())  # a 64th of the memory of unpacking


def require_finite(where: str, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` itself. Raises UserError, which begins with `where`, for a NaN or an infinity."""
    # aminmax is NaN for a tensor with a NaN, and takes a hundredth of the time of isfinite.
    if tensor.is_floating_point() and tensor.numel() and not all(map(math.isfinite, torch.aminmax(tensor))):
        raise UserError(f"{where} holds values that are NaN or infinite; such a model computes nothing, so give one "
                        "from before it diverged or was damaged")
    return tensor


def count_kept(where: str, bitmask: torch.Tensor, num_columns: int, num_stored: int, is_int4: bool) -> int:
    """Values of a weight by its bits. Raises UserError, which begins with `where`, unless `num_stored` entries, of
    INT4 bytes, are as many."""
    num_kept = count_bits(bitmask, num_columns, f"{where}.bitmask")
    if num_stored != (-(-num_kept // 2) if is_int4 else num_kept):
        raise UserError(f"{where} keeps {num_kept} positions by its bits but has {num_stored} "
                        f"{'bytes of codes' if is_int4 else 'values'}; the file is damaged")
    return num_kept


def read_weight(where: str, values: torch.Tensor, bitmask: torch.Tensor, num_columns: int) -> BitmaskTensor:
    """The weight of tensors as they are stored, codes of eight and of four bits as int8. Raises UserError, which begins
    with `where`, for tensors that do not belong together."""
    is_int4 = values.dtype == torch.uint8
    num_kept = count_kept(where, bitmask, num_columns, len(values), is_int4)
    if is_int4:
        if num_kept % 2 and values[-1] > 15:
            raise UserError(f"{where}.values has a code behind its {num_kept}; the file is damaged")
        values = unpack_nibbles(values, num_kept)
    return BitmaskTensor(values, bitmask, (len(bitmask), num_columns))


class TensorFolder:
    """The tensors of a checkpoint folder, dense or sparse, read one by one. Raises UserError where there is none.

    `names`: tensors outside the sparse weights. `shapes`: (R, C) of each sparse weight. Reading a tensor raises
    UserError where it holds a NaN or an infinity.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._tensors, self.shapes = read_headers(self.folder)
        parts = {f"{name}.{part}" for name in self.shapes for part in PARTS}
        self.names = [name for name in self._tensors if name not in parts]

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def spec(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and safetensors dtype (F32, BF16, I8, ...) of a stored tensor, without reading it."""
        return self._tensors[name][1:]

    def get(self, name: str) -> torch.Tensor:
        with safe_open(self._tensors[name].file, "pt") as opened:
            return require_finite(f"{self.folder}: {name}", opened.get_tensor(name))

    def get_dense(self, name: str) -> torch.Tensor:
        """As get, but a sparse weight under its name in the dense model, with zeros in place; of codes, these times
        their scale, float32."""
        module = name.removesuffix(".weight")
        if module not in self.shapes:
            return self.get(name)
        return multiply_out(self.weight(module), self.scale(module))

    def get_range(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Entries start..stop-1 of the flattened tensor; only the rows that hold them are read."""
        file, shape, _ = self._tensors[name]
        if not shape:
            return self.get(name).flatten()[start:stop]
        with safe_open(file, "pt") as opened:
            view = opened.get_slice(name)
            row = math.prod(shape[1:])
            first = start // max(1, row)
            rows = view[first:-(-stop // row)] if start < stop else view[0:0]
            return require_finite(f"{self.folder}: {name}",
                                  rows.flatten()[start - first * row:stop - first * row].clone())

    def bits(self, name: str) -> torch.Tensor:
        """The bitmask of the sparse weight `name`, checked against its shape and the number of its values."""
        return self._counted_bits(name)[0]

    def num_kept(self, name: str) -> int:
        """Values of the sparse weight `name`, counted by its bits, which are checked."""
        return self._counted_bits(name)[1]

    def _counted_bits(self, name: str) -> tuple[torch.Tensor, int]:
        bitmask, ((num_stored,), dtype) = self.get(f"{name}.bitmask"), self.spec(f"{name}.values")
        return bitmask, count_kept(f"{self.folder}: {name}", bitmask, self.shapes[name][1], num_stored, dtype == INT4)

    def weight(self, name: str) -> BitmaskTensor:
        """The sparse weight `name`, codes of eight and of four bits as int8 without their scale."""
        return read_weight(f"{self.folder}: {name}", self.get(f"{name}.values"), self.get(f"{name}.bitmask"),
                           self.shapes[name][1])

    def scale(self, name: str) -> torch.Tensor | None:
        """(R,) float32 for int8 values, (R, ceil(C / 128)) bfloat16 for codes of four bits, else None."""
        return self.get(f"{name}.scale") if f"{name}.scale" in self else None
