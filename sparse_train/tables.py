"""Tables of text for a terminal. In a narrow one cells are folded, or a row becomes several lines; nothing is cut off,
and no cell is interpreted as markup."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

_NARROWEST = 12  # of a column of text


def make_table(console: Console, header: Sequence[str], rows: Iterable[Sequence[str]], num_left: int = 1) -> Table:
    """The first `num_left` columns are text and left-aligned, the others numbers and right-aligned. A column without
    any text in its cells is left out."""
    rows = [list(row) for row in rows]
    shown = [index for index in range(len(header)) if not rows or any(row[index] for row in rows)]
    columns = [[row[index] for row in [header, *rows]] for index in shown]
    num_left = sum(index < num_left for index in shown)
    room = console.width - 2 * len(shown)  # without the padding
    widths = _widths(columns, room, num_left)
    if sum(widths) > room:
        return _records(columns)
    table = Table(box=None, header_style="bold")
    for index, (column, width) in enumerate(zip(columns, widths, strict=True)):
        table.add_column(column[0], justify="left" if index < num_left else "right", overflow="fold", width=width)
    for row in zip(*(column[1:] for column in columns), strict=True):
        table.add_row(*map(Text, row))
    return table


def print_table(console: Console, header: Sequence[str], rows: Iterable[Sequence[str]], num_left: int = 1) -> None:
    console.print(make_table(console, header, rows, num_left))


def _widths(columns: Sequence[Sequence[str]], room: int, num_left: int) -> list[int]:
    """Widths of columns, each a header and its cells: full, or folded as far as needed to fit into `room`. Headers are
    folded at spaces first, then text at spaces, then text within words; numbers never are."""
    widths = [max(map(len, column)) for column in columns]
    headers = [_longest(column[0].split()) for column in columns]
    cells = [_longest(column[1:]) for column in columns]
    words = [_longest(" ".join(column[1:]).split()) if index < num_left else cells[index]
             for index, column in enumerate(columns)]
    at_spaces = list(map(max, headers, words))
    anywhere = [min(_NARROWEST, width) if index < num_left else width for index, width in enumerate(at_spaces)]
    for least in (list(map(max, headers, cells)), at_spaces, anywhere):
        while sum(widths) > room and (wide := [i for i, width in enumerate(widths) if width > least[i]]):
            widths[max(wide, key=widths.__getitem__)] -= 1
    return widths


def _longest(texts: Iterable[str]) -> int:
    return max(map(len, texts), default=0)


def _records(columns: Sequence[Sequence[str]]) -> Table:
    """Each cell on a line of its own behind its column's name, with an empty line between rows."""
    table = Table(box=None, show_header=False)
    table.add_column(style="bold", overflow="fold")
    table.add_column(overflow="fold")
    names = [column[0] for column in columns]
    for row in zip(*(column[1:] for column in columns), strict=True):
        for name, text in zip(names, row, strict=True):
            if text:
                table.add_row(name, Text(text))
        table.add_row("", "")
    return table
