"""sparse-train bench serve, with real servers."""

import json

import pytest

from sparse_train.launch.cli import main
from tests.serve.conftest import PYTHON
from tests.serve.models import sparse_model, write


@pytest.mark.slow
def test_two_folders_are_served_in_turns(tmp_path, capsys):
    model = sparse_model("llama")
    folders = [str(write(tmp_path / precision, model, precision)) for precision in ("bf16", "int8")]
    assert main(["bench", "serve", "--model", *folders, "--python", str(PYTHON), "--concurrent", "1", "3",
                 "--prompt-tokens", "8", "--new-tokens", "8", "--repeats", "2", "--eager"]) == 0
    out = capsys.readouterr().out
    rows = json.loads(out.splitlines()[-1])["rows"]
    assert [(row["model"], row["concurrent"]) for row in rows] == [(folder, n) for n in (1, 3) for folder in folders]
    assert all(0 < row["low"] <= row["tokens_per_second"] <= row["high"] for row in rows)
    assert [row["speedup"] for row in rows[::2]] == [1.0, 1.0] and "at a time" in out
