"""make gpu, with parts that need no GPU: what is there is kept, failures are told, the rest goes on."""

import json
import subprocess
import sys

import pytest
import torch

from sparse_train import artifacts
from sparse_train.bench.gpu import WHOLE
from sparse_train.config import ModelConfig
from sparse_train.inference import gpu
from sparse_train.launch.cli import main
from sparse_train.sparse import BitmaskTensor
from tests.gpu import PARTS, Figure, Part, run_parts, table

_CARD = {"card": "a card", "driver": "1"}


def _part(name, program, **options):
    return Part(name, (sys.executable, "-c", program), (Figure(f"figure of {name}", lambda r: f"{r['x']:.1f}", "2"),),
                **options)


def _counting(folder, name, then="print('{\"x\": 1}')"):
    return _part(name, f"open({str(folder / name)!r}, 'a').write('x'); {then}")


def _runs(folder, name):
    return (folder / name).read_text(encoding="utf-8")


def test_parts_that_are_done_are_kept_and_those_that_failed_run_again(tmp_path, capfd):
    good, bad = _counting(tmp_path, "good"), _counting(tmp_path, "bad", "raise ValueError('no | luck')")
    other = _counting(tmp_path, "other", "print('begin'); print('{\"y\": 1}')")
    parts = (bad, _part("slow", "import time; time.sleep(60)", limit_s=1), good, other,
             Part("absent", ("no-such-program",), bad.figures))
    assert not run_parts(parts, _CARD, tmp_path / "out")
    found = artifacts.read_json(tmp_path / "out" / "results.json")["parts"]
    assert {name: part["error"] for name, part in found.items()} == {
        "bad": "ValueError: no | luck", "slow": "it took more than 1 s", "good": None, "other": None,
        "absent": "no-such-program: No such file or directory"}
    rows = (tmp_path / "out" / "results.md").read_text(encoding="utf-8").splitlines()
    cells = {row.split(" | ")[0].strip("| "): row.split(" | ")[1] for row in rows if row.startswith("| ")}
    assert cells == {"what": "figure", "figure of bad": "failed: ValueError: no / luck", "figure of good": "1.0",
                     "figure of slow": "failed: it took more than 1 s", "figure of other": "not measured"} | {
                         "figure of bad": cells["figure of bad"]}

    mended = _counting(tmp_path, "bad")
    assert run_parts((mended, good), _CARD, tmp_path / "out")
    assert (_runs(tmp_path, "bad"), _runs(tmp_path, "good")) == ("xx", "x")
    assert run_parts((mended, good), _CARD | {"driver": "2"}, tmp_path / "out")
    assert (_runs(tmp_path, "bad"), _runs(tmp_path, "good")) == ("xxx", "xx")
    (kept,) = (tmp_path / "out").glob("results-*.json")
    assert artifacts.read_json(kept)["machine"] == _CARD and kept.with_suffix(".md").exists()


def test_a_result_is_found_before_late_warnings_and_its_absence_is_an_error(tmp_path):
    parts = (_part("late", "print('{\"x\": 1}'); print('a warning'); print(3)"), _part("none", "print('a warning')"))
    assert not run_parts(parts, _CARD, tmp_path)
    found = artifacts.read_json(tmp_path / "results.json")["parts"]
    assert (found["late"]["error"], found["late"]["result"]) == (None, {"x": 1})
    assert (found["none"]["error"], found["none"]["result"]) == ("it printed no result", None)


def test_each_result_is_written_before_the_next_part_begins(tmp_path):
    file = tmp_path / "out" / "results.json"
    second = _part("second", f"import json; print(json.dumps({{'x': len(json.load(open({str(file)!r}))['parts'])}}))")
    assert run_parts((_part("first", "print('{\"x\": 1}')"), second), _CARD, tmp_path / "out")
    assert artifacts.read_json(file)["parts"]["second"]["result"] == {"x": 1}


def test_the_table_has_every_figure_before_anything_is_run():
    rows = table(PARTS, {"machine": _CARD, "parts": {}}).splitlines()
    assert rows[0] == "card: a card  "
    assert sum("not yet run" in row for row in rows) == sum(len(part.figures) for part in PARTS) > 40
    assert all(len(part.figures) == len({figure.name for figure in part.figures}) for part in PARTS)


def test_without_a_gpu_it_is_one_line():
    done = subprocess.run([sys.executable, "-c", "import torch, sys; torch.version.cuda = None\n"
                           "from tests.gpu import main; sys.exit(main())"], capture_output=True, text=True,
                          encoding="utf-8")
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("cuda: torch")


@pytest.mark.slow
def test_figures_are_read_from_what_the_commands_print(monkeypatch, capsys):
    """Of small shapes, on a stand-in for a GPU, whose kernels are interpreted; torch has no 2:4 product there."""
    pytest.importorskip("triton")
    monkeypatch.setattr(gpu, "find_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "none")
    monkeypatch.setattr("sparse_train.bench.gpu.device_bandwidth", lambda device: 1e9)
    for name in ("gpu.LLAMA_8B_BLOCK", "layers.MPT_7B_BLOCK"):
        monkeypatch.setattr(f"sparse_train.bench.{name}", ((64, 128), (64, 192)))
    monkeypatch.setattr("sparse_train.bench.layers.random_weights", _exact_weights)
    size = ModelConfig(family="llama", d_model=32, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=64, max_seq_len=64,
                       vocab_size=300)
    monkeypatch.setattr("sparse_train.bench.gpu.random_weights", _exact_weights)
    monkeypatch.setitem(WHOLE, "llama-8b", size)
    few = {"decode": ["--prompt-tokens", "2", "--new-tokens", "2"]}
    for part in (PARTS[0], PARTS[2]):
        arguments = part.command[part.command.index("bench"):]
        assert main([*arguments, "--repeats", "1", *few.get(arguments[1], [])]) == 0
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        rows = table([part], {"machine": {}, "parts": {part.name: {"error": None, "result": result}}})
        missing = [row for row in rows.splitlines() if "not measured" in row]
        assert all("cusparselt" in row for row in missing) and len(missing) <= 2, rows


def _exact_weights(shapes, sparsity, seed=0, device=None):
    """Of which each row keeps the same number, so that small weights have the sparsity that large ones have."""
    return [BitmaskTensor.from_dense(torch.ones(shape), (torch.arange(shape[1]) < round((1 - sparsity) * shape[1]))
                                     .expand(shape)) for shape in shapes]
