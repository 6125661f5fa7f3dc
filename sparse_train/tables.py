"""Tables of text for a terminal."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table


def make_table(header: Sequence[str], rows: Iterable[Sequence[str]], num_left: int = 1) -> Table:
    """The first `num_left` columns are aligned to the left, the others to the right."""
    table = Table(box=None, header_style="bold")
    for index, title in enumerate(header):
        table.add_column(title, justify="left" if index < num_left else "right", no_wrap=True, overflow="ignore")
    for row in rows:
        table.add_row(*row)
    return table


def print_table(console: Console, header: Sequence[str], rows: Iterable[Sequence[str]], num_left: int = 1) -> None:
    console.print(make_table(header, rows, num_left))
