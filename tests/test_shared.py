"""Packed weights that processes share: what is loaded from them, when they are made again, and when they cannot be."""

import json
import os
import subprocess
import sys

import pytest
import torch

from sparse_train.compress import export_sparse
from sparse_train.config import PruneConfig
from sparse_train.errors import UserError
from sparse_train.inference import load, shared
from sparse_train.models import save_model
from sparse_train.pruning import prune
from sparse_train.sparse import BitmaskTensor, sparsify
from tests.models import tiny_mpt, tiny_tokenizer


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Where this user's entries go; tiny folders are large enough."""
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", tmp_path / "assets")
    monkeypatch.setattr(shared, "_LEAST_BYTES", 0)
    return tmp_path / "assets" / "sparse-train" / "packed" / "users" / str(os.geteuid())


def _export(folder, precision="int8", seed=0):
    torch.manual_seed(seed)
    model = tiny_mpt(d_model=64, vocab_size=300)
    export_sparse(sparsify(model, prune(model, [], PruneConfig(method="magnitude", sparsity=0.75))), tiny_tokenizer(),
                  precision, folder)
    return folder


def _logits(folder, **options):
    with torch.no_grad():
        return load(folder, **options).model(torch.arange(10)[None]).logits


def _entries(place):
    return sorted(path for path in place.iterdir() if path.is_dir())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4"])
def test_shared_weights_are_those_of_the_folder(precision, place, tmp_path, caplog):
    folder = _export(tmp_path / "model", precision)
    expected = _logits(folder, shared=False)
    assert not place.exists()
    for _ in range(2):
        assert torch.equal(_logits(folder), expected)
    (entry,) = _entries(place)
    assert [record.message for record in caplog.records if "packed weights" in record.message] == [
        f"{folder}: its packed weights (0 MB) are kept in {entry}, for all processes"]
    assert place.stat().st_mode & 0o777 == 0o700


def test_a_dense_folder_has_nothing_to_share(place, tmp_path, caplog):
    save_model(tmp_path / "model", tiny_mpt(vocab_size=300), tiny_tokenizer())
    load(tmp_path / "model")
    assert not place.exists() and not caplog.records


def test_an_entry_that_is_not_of_the_folder_is_made_again(place, tmp_path, caplog):
    folder = _export(tmp_path / "model")
    first = _logits(folder)
    (entry,) = _entries(place)
    blocks, manifest = entry / "blocks", entry / "manifest.json"

    def flip():
        data = bytearray(blocks.read_bytes())
        data[len(data) // 2] ^= 1
        blocks.write_bytes(data)

    for spoil in (flip, lambda: os.truncate(blocks, 1000), lambda: os.truncate(blocks, 0), blocks.unlink,
                  lambda: manifest.write_text("{", encoding="utf-8"), (entry / "DONE").unlink):
        spoil()
        caplog.clear()
        assert torch.equal(_logits(folder), first)
        assert "packed weights" in caplog.text and _entries(place) == [entry]
    _export(folder, seed=1)
    other = _logits(folder)
    assert not torch.equal(other, first) and torch.equal(other, _logits(folder, shared=False))
    assert _entries(place) == [entry]
    folder.rename(tmp_path / "elsewhere")
    _logits(tmp_path / "elsewhere")
    assert entry not in _entries(place) and len(_entries(place)) == 1


@pytest.mark.parametrize("trouble", ["file", "link", "writable", "full"])
def test_where_nothing_can_be_shared_one_process_has_the_weights(trouble, place, tmp_path, monkeypatch, caplog):
    folder = _export(tmp_path / "model")
    place.parent.mkdir(parents=True)
    if trouble == "file":
        place.touch()
    elif trouble == "link":
        (tmp_path / "another").mkdir(mode=0o700)
        place.symlink_to(tmp_path / "another")
    elif trouble == "writable":
        place.mkdir()
        place.chmod(0o777)
    else:
        def fill(*args, **options):
            raise OSError(28, "No space left on device")
        monkeypatch.setattr("sparse_train.artifacts.publish", fill)
    assert torch.equal(_logits(folder), _logits(folder, shared=False))
    (line,) = [record.message for record in caplog.records if record.name == "sparse_train.inference.shared"]
    assert "its weights take memory in this process alone, since they cannot be shared" in line
    assert trouble not in ("full", "writable") or not _entries(place)


def test_weights_that_are_damaged_are_refused_and_leave_nothing(place, tmp_path):
    folder = _export(tmp_path / "model")
    (file,) = folder.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + length])
    start, _ = next(of["data_offsets"] for name, of in header.items() if name.endswith("up_proj.bitmask"))
    data[8 + length + start] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="positions by its bits"):
        load(folder)
    assert not _entries(place)


_TWO = """if True:
    import gc, re, sys
    from sparse_train.inference import load

    def status(key):
        with open("/proc/self/status") as file:
            return 1024 * int(re.search(rf"^{key}:\\s+(\\d+) kB", file.read(), re.M)[1])

    def pss_of_blocks():
        with open("/proc/self/smaps") as file:
            mapped = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", file.read(), flags=re.M)
        return sum(1024 * int(re.search(r"^Pss:\\s+(\\d+) kB", part, re.M)[1]) for part in mapped
                   if part.split("\\n")[0].endswith("/blocks"))

    load(sys.argv[1])  # what every model loads of code
    for folder in sys.argv[2:]:
        for shared in (False, True):
            runtime = None
            gc.collect()
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # the peak is that from now on
            before = status("VmRSS")
            runtime = load(folder, shared)
            print(status("VmHWM") - before, flush=True)
        input()
        print(pss_of_blocks(), flush=True)
        input()
"""


@pytest.mark.slow
def test_loading_takes_little_more_than_the_folder_and_two_processes_hold_it_once(tmp_path):
    torch.manual_seed(0)
    model = tiny_mpt(d_model=1024, n_layers=4, vocab_size=25_000)
    for name, linear in list(model.named_modules()):
        if isinstance(linear, torch.nn.Linear) and "blocks" in name:
            sparsify(model, {name: BitmaskTensor.from_dense(linear.weight, torch.rand_like(linear.weight) < 0.5)})
    folders = [tmp_path / precision for precision in ("fp32", "bf16", "int8", "int4")]
    for folder in folders:
        export_sparse(model, tiny_tokenizer(), folder.name, folder)
    processes = [subprocess.Popen([sys.executable, "-c", _TWO, _export(tmp_path / "small"), *folders],
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8",
                                  env=os.environ | {"HF_HOME": str(tmp_path / "home")}) for _ in range(2)]

    def ask(process):
        process.stdin.write("\n")
        process.stdin.flush()
        return int(process.stdout.readline())

    try:
        for folder in folders:
            size = sum(file.stat().st_size for file in folder.iterdir())
            peaks = [int(process.stdout.readline()) / size for process in processes for _ in range(2)]
            assert max(peaks) < 1.15, f"{folder.name}: {peaks}"
            (blocks,) = (tmp_path / "home").glob(f"assets/sparse-train/packed/users/*/{folder.name}-*/blocks")
            assert sum(map(ask, processes)) == pytest.approx(blocks.stat().st_size, rel=0.02), folder.name
            for process in processes:
                process.stdin.write("\n")
                process.stdin.flush()
        assert [process.wait(60) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
