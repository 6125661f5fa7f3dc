"""push, against a stand-in for the hub's HTTP API: what is uploaded, what the card tells, what is refused."""

import base64
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, constants

from sparse_train import artifacts
from sparse_train.compress import export_dense, export_sparse
from sparse_train.config import PruneConfig, RunConfig
from sparse_train.hub import hub_answers
from sparse_train.launch.cli import main
from sparse_train.models import load_model
from sparse_train.pruning import prune
from sparse_train.sparse import sparsify
from tests.models import tiny_model

_TOKEN = "hf_secret"


class _Hub(ThreadingHTTPServer):
    """Repositories that create_repo and create_commit write: name -> {"private", "files": name -> bytes}."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos, self.status = {}, {}


class _Handler(BaseHTTPRequestHandler):
    server: _Hub

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self._answer({})

    def do_GET(self):
        name = self.path.removeprefix("/api/models/")
        if name not in self.server.repos:
            return self._answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        repo = self.server.repos[name]
        card = ModelCard(repo["files"].get("README.md", b"").decode())
        self._answer({"id": name, "private": repo["private"], "cardData": card.data.to_dict(),
                      "siblings": [{"rfilename": file} for file in [".gitattributes", *repo["files"]]]})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        action = self.path.rsplit("/", 2)[1]
        if self.headers["Authorization"] != f"Bearer {_TOKEN}" and action != "api":
            return self._answer({"error": "Invalid credentials"}, 401)
        if action in self.server.status:
            return self._answer({"error": "no"}, self.server.status[action])
        if self.path == "/api/validate-yaml":
            yaml.safe_load(json.loads(body)["content"].split("---")[1])
            return self._answer({"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.server.repos[name] = {
                "private": asked.get("private") or asked.get("visibility") == "private", "files": {}}
            return self._answer({"url": f"{constants.ENDPOINT}/{name}"})
        name = "/".join(self.path.split("/")[3:5])
        if action == "preupload":
            return self._answer({"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                                           for file in json.loads(body)["files"]]})
        files = self.server.repos[name]["files"]
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del files[line["value"]["path"]]
        self._answer({"commitUrl": f"{constants.ENDPOINT}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40})

    def _answer(self, data, status=200, headers=()):
        self.send_response(status)
        body = json.dumps(data).encode()
        for key, value in {"Content-Length": str(len(body)), **dict(headers)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@pytest.fixture
def hub(monkeypatch):
    server = _Hub()
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", _TOKEN)
    hub_answers.cache_clear()
    yield server
    server.shutdown()
    server.server_close()
    hub_answers.cache_clear()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with what compress and report leave, as far as a card reads it."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    model, processor = tiny_model("llama")
    sparsify(model, prune(model, [], PruneConfig(method="magnitude", sparsity=0.5, pattern="2:4")))
    compress = folder / "compress"
    export_sparse(model, processor, "int8", compress / "sparse-int8")
    export_dense(model, processor, compress / "dense")
    config = RunConfig.model_validate({
        "name": "tiny", "folder": str(folder.parent), "model": {"path": "owner/base"},
        "task": {"name": "gsm8k", "path": str(folder.parent)}, "prune": {"pattern": "2:4"},
        "finetune": {"losses": {"ce": {}}}, "dense": {"steps": 3}}).model_dump(mode="json")
    artifacts.sign(compress, {"stage": "compress", "config": config, "metrics": {}})
    metrics = {"exact_match": 0.25, "exact_match_flexible": 0.5, "cross_entropy": 1.5, "num_examples": 40,
               "max_new_tokens": 128, "shots": 0, "num_left_out": 2}
    scores = [{"model": "tiny", "loss": loss, "engine": engine, "sparsity": sparsity, "metric": metric, "value": value}
              for loss, engine, sparsity in (("dense", "fp32", 0.0), ("ce", "fp32", 0.5), ("ce", "runtime int8", 0.5),
                                             ("ce", "fp32", 0.75))
              for metric, value in metrics.items()]
    speed = {"model": "tiny", "what": "decode", "engine": "sparse", "precision": "int8", "sparsity": 0.5,
             "milliseconds": 1.0, "low": 1.0, "high": 1.1, "speedup": 2.5, "fraction_of_byte_bound": 0.5}
    (folder / "report").mkdir()
    artifacts.write_json(folder / "report" / "report.json", {
        "run": "tiny", "about": "", "task": "gsm8k", "metric": "exact_match", "compressed_loss": "ce",
        "scores": scores, "speed": [speed], "num_bytes": {"dense": 100, "sparse-int8": 30}, "machines": [
            {"device": "a CPU", "threads": 2, "backend": "avx512", "read_bandwidth_bytes_per_second": 1e10}]})
    digest = artifacts.digest(artifacts.read_manifest(compress)["files"])
    artifacts.sign(folder / "report", {"stage": "report", "sources": {"inputs": {"compress": digest}}})
    return folder


def test_the_card_tells_what_the_manifests_say(run, hub, capsys):
    hub.repos["owner/base"] = {"private": False, "files": {"README.md": b"---\nlicense: apache-2.0\n---\n"}}
    assert main(["push", str(run / "compress" / "sparse-int8"), "owner/tiny-sparse", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    card = ModelCard(shown)
    data = card.data.to_dict()
    assert data["base_model"] == "owner/base" and data["license"] == "apache-2.0"
    assert data["library_name"] == "sparse-train"
    assert data["pipeline_tag"] == "text-generation" and data["tags"] == ["sparse-train", "sparse", "pruning", "int8"]
    (result,) = data["model-index"][0]["results"]
    assert {metric["type"]: metric["value"] for metric in result["metrics"]} == {
        "exact_match": 0.25, "cross_entropy": 1.5}
    text = card.text
    assert "50.0% of the weights in 14 linears are pruned (2:4), and stored as kept values (int8)" in text
    assert "[owner/base](https://huggingface.co/owner/base)" in text
    assert "sparse-train generate owner/tiny-sparse" in text and "After `import sparse_train`, `from_pre" in text
    assert "| ce | runtime int8 | 0.50 | 0.250 | 0.500 | 1.5000 | 40 |" in text
    assert "\n* 2 test examples that do not fit the model are left out" in text
    assert "| tiny | decode | sparse int8 | 0.50 | 1.000 | 10% | 2.50x | 0.50 |" in text and "a CPU, 2 threads" in text
    assert "| model.layers.0.mlp.up_proj | 128 x 32 | 0.5000 |" in text and f"torch {torch.__version__}" in text
    recipe = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert recipe["model"] == {"path": "owner/base"} and recipe["task"]["path"] == run.parent.name
    assert recipe["prune"]["pattern"] == "2:4" and "folder" not in recipe
    assert str(run.parent) not in shown and "model.safetensors" not in shown and "manifest.json" not in shown
    assert {"sparse.safetensors", "tokenizer.json", "config.json"} <= set(shown.splitlines())


def test_an_upload_is_the_folder_and_its_card(run, hub, tmp_path, capsys):
    folder = run / "compress" / "sparse-int8"
    assert main(["push", str(folder), "owner/tiny", "--private"]) == 0
    told = capsys.readouterr()
    assert "owner/tiny: " in told.out and _TOKEN not in told.out + told.err
    repo = hub.repos["owner/tiny"]
    assert repo["private"] and set(repo["files"]) == {
        "README.md", "config.json", "generation_config.json", "sparse.safetensors", "tokenizer.json",
        "tokenizer_config.json"}
    for name, content in repo["files"].items():
        if name != "README.md":
            assert content == (folder / name).read_bytes(), name
    assert artifacts.damage(folder) is None and not (folder / "README.md").exists()
    # Again, from another folder: the weights that it has not go.
    assert main(["push", str(run / "compress" / "dense"), "owner/tiny"]) == 0
    assert {name for name in repo["files"] if "safetensors" in name} == {"model.safetensors"}
    assert ModelCard(repo["files"]["README.md"].decode()).data.library_name == "transformers"
    for name, content in repo["files"].items():
        (tmp_path / name).write_bytes(content)
    assert torch.equal(load_model(tmp_path).lm_head.weight, load_model(run / "compress" / "dense").lm_head.weight)


def test_what_cannot_be_uploaded_is_told_in_one_line(run, hub, tmp_path, monkeypatch, capsys):
    folder = str(run / "compress" / "sparse-int8")

    def refused(*arguments):
        assert main(["push", *map(str, arguments)]) == 2
        told = capsys.readouterr()
        lines = [line for line in told.err.splitlines() if "sparse-train: " in line]
        assert len(lines) == 1 and "Traceback" not in told.err and _TOKEN not in told.out + told.err
        return lines[0]

    hub.repos["owner/other"] = {"private": False, "files": {"README.md": b"---\ntags: [x]\n---\n", "a.bin": b"1"}}
    assert "owner/other exists and was not uploaded by sparse-train" in refused(folder, "owner/other")
    assert hub.repos["owner/other"]["files"]["a.bin"] == b"1"
    hub.repos["owner/public"] = {"private": False, "files": {}}
    assert "owner/public exists and is public" in refused(folder, "owner/public", "--private")
    assert "give OWNER/NAME" in refused(folder, "a b")
    assert "give OWNER/NAME" in refused(folder, "tiny")
    assert "there is no folder" in refused(tmp_path / "none", "owner/tiny")
    hub.status["repos"] = 403
    assert "may not write there; give one that may, or another owner than them" in refused(folder, "them/tiny")
    hub.status = {"commit": 500}
    assert "owner/public is not uploaded: " in refused(folder, "owner/public")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "the token is not valid" in refused(folder, "owner/tiny")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert "there is no token for the hub" in refused(folder, "owner/tiny")
    monkeypatch.setenv("HF_TOKEN", _TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    hub_answers.cache_clear()
    assert "http://127.0.0.1:9 does not answer" in refused(folder, "owner/tiny")
    (run / "compress" / "sparse-int8" / "generation_config.json").write_text("{}")
    assert "is not the file that was signed; run what made" in refused(folder, "owner/tiny")
