"""Measurements as text tables. Doubtful cells are marked with !, and a line below the table explains the mark."""

from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console

from sparse_train import kernels
from sparse_train.tables import print_table

_MAX_SPREAD = 0.5
_BUSY_NOTE = (
    f"! this machine is too busy to measure: a spread above {_MAX_SPREAD:.0%}, or a bound above 1 (faster than memory "
    "was read; weights that stay in a cache can be, too), is marked; measure again when nothing else runs")

SPEED_HEADER = ("model", "what", "engine", "zeros", "ms", "spread", "speed-up", "bound")


def speed_cells(row: dict[str, Any]) -> list[str]:
    """A row of layer_rows or decode_rows as text under SPEED_HEADER."""
    return [row["model"], row["what"], f"{row['engine']} {row['precision']}", f"{row['sparsity']:.2f}",
            f"{row['milliseconds']:.3f}", spread_cell(row["low"], row["milliseconds"], row["high"]),
            f"{row['speedup']:.2f}x", _cell(f"{row['fraction_of_byte_bound']:.2f}", row["fraction_of_byte_bound"] > 1)]


def spread_cell(low: float, median: float, high: float) -> str:
    """The distance between the quartiles, divided by the median."""
    spread = (high - low) / median
    return _cell(f"{spread:.0%}", spread > _MAX_SPREAD)


def _cell(text: str, is_doubtful: bool) -> str:
    return f"{text}!" if is_doubtful else text


def notes(rows: Iterable[Sequence[str]], backends: Iterable[str]) -> list[str]:
    """Lines to print below `rows` of cells that were measured with these kernel backends."""
    is_marked = any(cell.endswith("!") for row in rows for cell in row)
    return [_BUSY_NOTE] * is_marked + [kernels.PORTABLE_NOTE] * ("portable" in backends)


def print_measured(console: Console, header: Sequence[str], rows: Iterable[Sequence[str]],
                   backends: Iterable[str] = (), num_left: int = 1) -> None:
    """Print a table and its notes; the first `num_left` columns are text."""
    rows = list(rows)
    print_table(console, header, rows, num_left)
    for note in notes(rows, backends):
        console.print(note, style="yellow", highlight=False, soft_wrap=True)
