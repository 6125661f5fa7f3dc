"""docs/format.md describes the files: its reader, run as it stands on the page, finds what this package does."""

import ast
from pathlib import Path

import pytest
import torch

from sparse_train.compress import export_sparse
from sparse_train.config import PruneConfig
from sparse_train.models import open_model
from sparse_train.pruning import prune
from sparse_train.sparse import format as sparse_format
from sparse_train.sparse import sparsify
from tests.models import tiny_model

_PAGE = Path(__file__).parents[1] / "docs" / "format.md"


def _reader():
    text = _PAGE.read_text(encoding="utf-8").partition("## A reader\n")[2].partition("\n## ")[0]
    lines = [line[4:] for line in text.splitlines() if line.startswith("    ") or not line]
    return "\n".join(lines).strip()


def test_the_reader_takes_numpy_and_safetensors_and_fifty_lines():
    code = _reader()
    imports = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {getattr(node, "module", None) or alias.name for node in imports for alias in node.names}
    assert names == {"json", "numpy", "safetensors"} and len(code.splitlines()) <= 50


@pytest.mark.parametrize("family", ["mpt", "llama", "t5", "whisper"])
def test_the_reader_of_the_page_rebuilds_every_tensor(family, tmp_path, monkeypatch):
    read = {}
    exec(compile(_reader(), _PAGE.name, "exec"), read)
    for precision, int8_head, size in (("fp32", False, 1 << 30), ("bf16", False, 20_000), ("int8", True, 1 << 30),
                                       ("int4", True, 20_000)):
        monkeypatch.setattr(sparse_format, "_FILE_BYTES", size)
        folder = tmp_path / f"{precision}-{size}"
        model, processor = tiny_model(family)
        model = sparsify(model, prune(model, [], PruneConfig(method="magnitude", sparsity=0.5)))
        export_sparse(model, processor, precision, folder, int8_head)
        assert (len(list(folder.glob("*.safetensors"))) > 1) == (size == 20_000)
        found, (_, ours) = read["read_model"](folder), open_model(folder, quantised=True)
        assert found.keys() == {*ours.names, *(f"{name}.weight" for name in ours.shapes)} and ours.shapes
        for name, tensor in found.items():
            expected = ours.get_dense(name)
            expected = expected.float() if expected.dtype == torch.bfloat16 else expected
            assert torch.equal(torch.from_numpy(tensor.copy()), expected), (precision, name)
    (folder / "config.json").write_text((folder / "config.json").read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(ValueError, match="sparse-train of version 2"):
        read["read_model"](folder)
