"""Rows of a large linear over ranks.

Given the Hessian, least squares treats each row by itself, so ranks may have some of the rows each. Products are
computed panel by panel whether a linear is divided or not: the bits of a result do not depend on it.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

PANEL = 256
"""Rows of a product: enough for a device to be busy, and few enough that a layer of 7,168 rows is work for 28 ranks."""


class Piece(NamedTuple):
    """Rows start to stop - 1 of a linear, by its name, which one rank prunes."""

    name: str
    start: int
    stop: int
    rank: int


def divide(shapes: Mapping[str, tuple[int, int]], num_ranks: int, divides_rows: bool) -> list[Piece]:
    """Which rank prunes what of linears (R, C). All pieces of a linear follow each other, and divided ones come first:
    a rank that fails at a linear of its own then leaves no other waiting in the collectives of a divided one.

    Otherwise the costliest linear is first, and each goes to the rank that has least. A method factorises C x C and
    takes some products of that with R x C. With `divides_rows`, a linear of several panels that costs more than a
    rank's share of all is divided: every rank then has a piece of it, if only an empty one, and none has all of it.
    """
    costs = {name: _cost(*shape) for name, shape in shapes.items()}
    share = sum(costs.values()) / num_ranks
    divided = {name for name, (rows, _) in shapes.items() if divides_rows and costs[name] > share and rows > PANEL}
    loads, pieces = [0] * num_ranks, []
    for name in sorted(costs, key=lambda name: (name not in divided, -costs[name])):
        rows, columns = shapes[name]
        if name in divided:
            num_panels = -(-rows // PANEL)
            edges = [min(rows, PANEL * (num_panels * rank // num_ranks)) for rank in range(num_ranks + 1)]
            mine = [Piece(name, edges[rank], edges[rank + 1], rank) for rank in range(num_ranks)]
        else:
            mine = [Piece(name, 0, rows, loads.index(min(loads)))]
        for piece in mine:
            loads[piece.rank] += _cost(piece.stop - piece.start, columns)
        pieces += mine
    return pieces


def _cost(rows: int, columns: int) -> int:
    return columns * columns * (rows + columns)


def panels(*tensors: torch.Tensor) -> Iterator[Any]:
    """Tuples of the same rows of each of `tensors` (R, ...)."""
    return zip(*(tensor.split(PANEL) for tensor in tensors), strict=True)


def multiply(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """(R, C) of rows (R, C) and matrix (C, C)."""
    product = torch.empty_like(rows)
    for panel, out in panels(rows, product):
        torch.mm(panel, matrix, out=out)
    return product
