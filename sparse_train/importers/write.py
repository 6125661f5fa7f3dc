"""import_model: the linears of a source that are sparse become values and bits; the rest is copied.

The source is read twice, tensor by tensor: once to see which linears are sparse, once to write them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from sparse_train import artifacts
from sparse_train.errors import UserError
from sparse_train.importers.importer import Importer, open_source
from sparse_train.models import family_of, own_tensors, save_model
from sparse_train.sparse import BitmaskTensor, sparsify

_GROUP_SIZES = (4, 8, 16, 32)
"""M of the patterns N:M that are looked for."""
_FULL_GROUPS = 0.95
"""Of N:M, the share of its N per group that weights have at least: a sparse weight may have an accidental N:M as well.
"""


@dataclass(frozen=True)
class Layer:
    shape: tuple[int, int]
    num_kept: int
    most_in_group: Mapping[int, int]
    """M -> the most weights kept of any M neighbours of a row, for each M that divides it."""

    @property
    def num_weights(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def sparsity(self) -> float:
        return 1 - self.num_kept / self.num_weights


@dataclass(frozen=True)
class Imported:
    importer: str
    has_bits: bool
    """As in Importer."""
    sparse: dict[str, Layer]
    """By module name."""
    dense: dict[str, Layer]
    """Linears that the family prunes, with too few zeros."""

    @property
    def sparsity(self) -> float:
        """Of the sparse linears together."""
        return 1 - sum(layer.num_kept for layer in self.sparse.values()) / sum(
            layer.num_weights for layer in self.sparse.values())

    @property
    def pattern(self) -> str | None:
        """N:M of the smallest M, where all of the sparse linears have it."""
        for size in _GROUP_SIZES:
            most = [layer.most_in_group.get(size, size) for layer in self.sparse.values()]
            if max(most) < size and 1 - self.sparsity >= _FULL_GROUPS * max(most) / size:
                return f"{max(most)}:{size}"
        return None


def import_model(source: str, out: Path, min_sparsity: float, importer: str | None = None) -> Imported:
    """Write the model in `source` (folder, hub name or GGUF file) into the new, signed folder `out`; tensors keep the
    dtype that they are stored in.

    `importer`: a name of IMPORTERS, None: the one that recognises the source. Linears with at least `min_sparsity` of
    their weights pruned become sparse. Raises UserError where there is none, where `out` exists and where the source
    cannot be read.
    """
    with artifacts.written_aside(out) as aside:
        return _import(source, aside, min_sparsity, importer)


def _import(source: str, folder: Path, min_sparsity: float, importer: str | None) -> Imported:
    name, opened = open_source(source, importer)
    layers = {linear: _measure(_weight(opened, linear)) for linear in family_of(opened.model).dense_linears(
        opened.model)}
    sparse = {linear: layer for linear, layer in layers.items() if layer.sparsity >= min_sparsity}
    if not sparse:
        most = max(layers, key=lambda linear: layers[linear].sparsity)
        raise UserError(f"{source} has nothing sparse to import: the linear with the most zeros, {most}, has "
                        f"{layers[most].sparsity:.1%} of them, less than --min-sparsity {min_sparsity:g}; give a lower "
                        "one if these were pruned, or use the dense model as it is, which other commands read")
    imported = Imported(name, opened.has_bits, sparse, {linear: layers[linear] for linear in layers.keys() - sparse})
    save_model(folder, opened.model, opened.processor, _tensors(opened, sparse))
    place = str(Path(source).absolute()) if Path(source).exists() else source
    artifacts.sign(folder, {"source": place, "importer": name, "min_sparsity": min_sparsity,
                            "pattern": imported.pattern, "sparse_weights": {
        linear: {"shape": list(layer.shape), "sparsity": layer.sparsity} for linear, layer in sparse.items()}})
    return imported


def _weight(opened: Importer, linear: str) -> BitmaskTensor:
    weight = opened.weight(linear)
    if weight.values.numel():
        return weight
    keep = torch.zeros(weight.shape, dtype=torch.bool)  # of a linear of zeros: ZeRO-3 needs a value
    keep[0, 0] = True
    return BitmaskTensor.from_dense(torch.zeros(weight.shape, dtype=weight.dtype), keep)


def _measure(weight: BitmaskTensor) -> Layer:
    keep, width = weight.keep, weight.shape[1]
    return Layer(weight.shape, weight.values.numel(), {
        size: int(keep.unflatten(1, (-1, size)).sum(-1).max()) for size in _GROUP_SIZES if width % size == 0})


def _tensors(opened: Importer, sparse: Mapping[str, Layer]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of the model, whose sparse linears are replaced by SparseLinears without data."""
    for linear, layer in sparse.items():
        values, bits = (torch.empty(size, dtype=dtype, device="meta") for size, dtype in (
            (layer.num_kept, opened.model.dtype), ((layer.shape[0], 8 * -(-layer.shape[1] // 64)), torch.uint8)))
        sparsify(opened.model, {linear: BitmaskTensor(values, bits, layer.shape)})
    return _read(opened, sparse)


def _read(opened: Importer, sparse: Mapping[str, Layer]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in own_tensors(opened.model).items():
        linear, _, part = name.rpartition(".")
        if linear not in sparse or part == "bias":
            yield name, opened.folder.get(name) if tensor.is_meta else tensor
        elif part == "values":
            weight = _weight(opened, linear)
            yield name, weight.values
            yield f"{linear}.bitmask", weight.bitmask
