"""Tables at any width: every text is there, folded at most."""

import pytest
from rich.console import Console

from sparse_train.tables import print_table

_HEADER = ("model", "computed in", "sparsity", "exact match", "exact match flexible", "cross-entropy", "examples")
_ROWS = [[name, engine, "0.75", "0.955", "0.955", "0.0055", "400"]
         for name in ("squarehead", "[/ce]") for engine in ("runtime fp32", "runtime int8")]


@pytest.mark.parametrize("width, num_lines, told", [
    (200, 5, ["exact match flexible", "squarehead  runtime int8      0.75"]),
    (80, 7, ["[/ce]       runtime int8      0.75", "0.0055", "flexible"]),  # the header is folded
    (50, 32, ["exact match flexible  0.955", "computed in           runtime int8"]),  # a line per cell
])
def test_nothing_is_cut(width, num_lines, told, capsys):
    print_table(Console(width=width), _HEADER, _ROWS, 2)
    shown = capsys.readouterr().out
    assert shown.count("\n") == num_lines and max(map(len, shown.splitlines())) <= width
    assert all(text in shown for text in told)
    assert all(shown.count(text) == 2 for text in ("squarehead", "[/ce]", "fp32", "int8"))


def test_text_is_folded_before_numbers_and_empty_columns_are_left_out(capsys):
    print_table(Console(width=40), ("run", "job", "state", "ms"), [["a", "", "it ended in " + "x" * 30, "1234567"]], 3)
    shown = capsys.readouterr().out
    assert "job" not in shown and "1234567" in shown and "".join(shown.split()).count("x") == 30
