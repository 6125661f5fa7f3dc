"""Pruned blocks as files, each written and signed as it is finished. They are the only place where a whole student is.

    FOLDER/sparsities.json                     of each linear that is pruned
    FOLDER/step-00000003/sparse.safetensors    weights of the third block in turn, as the student has them; then DONE

A pruning that was killed goes on behind the last one.
"""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel

from sparse_train import artifacts, dist, kernels
from sparse_train.models import ModelFolder, own_tensors
from sparse_train.sparse import BitmaskTensor, TensorFolder, sparsify, write_tensors

log = logging.getLogger(__name__)


class PrunedBlocks:
    """The blocks of the model in `source` that have been pruned so far, and the others as they are there."""

    num_done: int

    def __init__(self, folder: Path, source: ModelFolder):
        """Collective. Blocks that an earlier attempt left in `folder` count up to the first that is missing or damaged;
        the others are deleted."""
        self._folder, self._source = folder, source
        self._pruned: dict[str, TensorFolder] = {}
        """Where each pruned weight is, by module name."""
        signed: list[str] = dist.from_rank_0([path.parent.name for path in folder.glob(f"*/{artifacts.DONE}")])
        damaged = {name: line for name in dist.share(sorted(signed)) if (line := artifacts.damage(folder / name))}
        damaged = {name: line for found in dist.gather_objects(damaged) for name, line in found.items()}
        self.num_done = 0
        while (name := self._next().name) in signed and name not in damaged:
            self._add_next()
        if dist.rank() == 0:
            for line in damaged.values():
                log.warning("pruned again from block %d on: %s", self.num_done + 1, line)
            for path in folder.glob("step-*"):
                if path.name not in signed or path.name >= self._next().name:
                    shutil.rmtree(path)
        dist.barrier()

    def sparsities(self, choose: Callable[[], Mapping[str, float]]) -> dict[str, float]:
        """Collective. By module name; what an earlier attempt chose counts, because choosing may take a pass over the
        model."""
        file = self._folder / "sparsities.json"
        found = dist.from_rank_0(artifacts.read_json(file) if dist.rank() == 0 and file.is_file() else None)
        if found is None:
            found = dict(choose())
            if dist.rank() == 0:
                self._folder.mkdir(parents=True, exist_ok=True)
                artifacts.write_json(file, found)
        return found

    def _next(self) -> Path:
        return self._folder / f"step-{self.num_done + 1:08d}"

    def _add_next(self) -> None:
        """Raises UserError where this node does not see the block."""
        if artifacts.require_manifest(self._next())["files"]:  # none where no linear of a block is pruned
            tensors = TensorFolder(self._next())
            self._pruned |= dict.fromkeys(tensors.shapes, tensors)
        self.num_done += 1

    def save(self, weights: Mapping[str, BitmaskTensor], require_newest_attempt: Callable[[], None]) -> None:
        """Collective. Add the next block's weights, which are the same on every rank."""
        if dist.rank() == 0:
            require_newest_attempt()
            partial = self._next().with_suffix(".partial")
            artifacts.clear(self._folder, (partial.name,))  # of an attempt that did not know yet that it was over
            partial.mkdir(parents=True)
            if weights:
                write_tensors(partial, ((f"{name}.{part}", tensor) for name, weight in weights.items() for part, tensor
                                        in (("values", weight.values), ("bitmask", weight.bitmask))),
                              {name: weight.shape for name, weight in weights.items()})
            artifacts.publish(partial, self._next(), {})
        dist.barrier()
        self._add_next()

    def read(self, name: str) -> torch.Tensor:
        """A tensor of the dense model, with zeros where it has been pruned."""
        return self._pruned.get(name.removesuffix(".weight"), self._source).get_dense(name)

    def earlier(self, name: str) -> torch.Tensor | None:
        """keep (R, C) of a linear that was sparse before."""
        if name not in self._source.shapes:
            return None
        return kernels.unpack(self._source.bits(name).to(dist.device()), self._source.shapes[name][1])

    def counts(self) -> dict[str, tuple[int, int]]:
        """Module name -> (kept weights, all weights) of what has been pruned."""
        return {name: (tensors.spec(f"{name}.values")[0][0], tensors.shapes[name][0] * tensors.shapes[name][1])
                for name, tensors in self._pruned.items()}

    def student(self, model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor), one by one, of `model`, which is without data and gets SparseLinears without data."""
        for name, tensors in self._pruned.items():
            values, bitmask = (torch.empty(tensors.spec(f"{name}.{part}")[0], dtype=dtype, device="meta")
                               for part, dtype in (("values", model.dtype), ("bitmask", torch.uint8)))
            sparsify(model, {name: BitmaskTensor(values, bitmask, tensors.shapes[name])})
        return self._read_student(own_tensors(model))

    def _read_student(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors.items():
            linear, _, part = name.rpartition(".")
            if linear in self._pruned and part != "bias":
                yield name, self._pruned[linear].get(name)
            else:
                yield name, self._source.get_dense(name).to(tensor.dtype) if tensor.is_meta else tensor
