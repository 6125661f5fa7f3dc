"""Stored weights, and parts of them as tensor parallelism divides them: rows, columns, rows of several in one.

A stored weight is (weight, scale): kept values and bits, and the scale of its codes, (R,) float32 for int8 and
(R, ceil(C / GROUP)) bfloat16 for codes of four bits, or None. Bits and values are cut together.
"""

from collections.abc import Sequence

import torch

from sparse_train import kernels
from sparse_train.sparse.bitmask import BitmaskTensor

Stored = tuple[BitmaskTensor, torch.Tensor | None]


def multiply_out(weight: BitmaskTensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Dense (R, C), of codes float32."""
    dense = weight.to_dense()
    if scale is None:
        return dense
    return dense * (scale[:, None] if scale.ndim == 1 else kernels.scale_of_columns(scale, weight.shape[1]))


def take_rows(weight: BitmaskTensor, scale: torch.Tensor | None, rows: torch.Tensor) -> Stored:
    """The rows `rows` (N,) int64, in that order."""
    values = weight.values.split(weight.keep.sum(1).tolist())
    taken = torch.cat([values[row] for row in rows.tolist()] or [weight.values[:0]])
    return (BitmaskTensor(taken, weight.bitmask[rows], (len(rows), weight.shape[1])),
            None if scale is None else scale[rows])


def take_columns(weight: BitmaskTensor, scale: torch.Tensor | None, start: int, stop: int) -> tuple[Stored, int]:
    """Columns start..stop-1, and the number of empty columns in front of them.

    There are such where columns share scales in groups and `start` is inside of one: the part then begins with the
    group, and nothing is kept before `start`. A product takes as many zeros in front of x.
    """
    num_front = start % kernels.GROUP if scale is not None and scale.ndim == 2 else 0
    keep = weight.keep
    inside = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
    inside[start:stop] = True
    values = weight.values[inside.expand_as(keep)[keep]]
    bitmask = kernels.pack((keep & inside)[:, start - num_front:stop])
    if scale is not None and scale.ndim == 2:
        scale = scale[:, start // kernels.GROUP:-(-stop // kernels.GROUP)]
    return (BitmaskTensor(values, bitmask, (weight.shape[0], stop - start + num_front)), scale), num_front


def stack_rows(parts: Sequence[Stored]) -> Stored:
    """One weight of the rows of all, which have as many columns, values of one dtype and scales of one kind."""
    weights, scales = [weight for weight, _ in parts], [scale for _, scale in parts if scale is not None]
    stacked = BitmaskTensor(torch.cat([weight.values for weight in weights]),
                            torch.cat([weight.bitmask for weight in weights]),
                            (sum(weight.shape[0] for weight in weights), weights[0].shape[1]))
    return stacked, torch.cat(scales) if scales else None
