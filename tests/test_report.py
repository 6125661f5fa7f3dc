"""The report's tables, and what its decoding rows count."""

import json

import pytest
import torch
from rich.console import Console

from sparse_train.bench import decode_rows
from sparse_train.config import ModelConfig
from sparse_train.inference import Runtime
from sparse_train.jobs.report import _page, print_tables
from sparse_train.models import build_model, build_processor
from sparse_train.tasks import Example
from tests.models import tiny_tokenizer


def _data(task, metric, **metrics):
    scores = [{"loss": "dense", "engine": "fp32", "sparsity": 0.0, "metric": name, "value": value}
              for name, value in {**metrics, "num_examples": 7}.items()]
    return {"run": "r", "about": "", "task": task, "metric": metric, "scores": scores, "speed": [],
            "compressed_loss": "ce", "num_bytes": {"dense": 10},
            "machines": [{"device": "cpu", "threads": 1, "backend": "x", "read_bandwidth_bytes_per_second": 1e9}]}


def test_the_tables_show_every_metric_and_how_they_were_taken(tmp_path):
    for task, metric, metrics, told in (
            ("gsm8k", "exact_match", {"exact_match_flexible": 0.75, "shots": 5, "cross_entropy": 1.0},
             ["0.500", "exact match flexible", "0.750", "shots: 5"]),
            ("translation", "bleu", {"chrf": 30.0, "bleu_signature": "nrefs:1|case:mixed", "cross_entropy": 1.0},
             ["chrf", "30.000", "bleu signature: nrefs:1|case:mixed"]),
            ("speech", "wer", {"cer": 0.25, "wer_normalised": 0.4, "cer_normalised": 0.2, "cross_entropy": None},
             ["cer normalised", "0.250", "0.400", "-"]),
            ("text", "perplexity", {"cross_entropy": 1.0, "books/perplexity": 34.5, "books/kl": 0.0625,
                                    "books/num_tokens": 9000, "books/num_left_out": 2},
             ["books perplexity", "34.500", "books kl", "0.062", "books: 9,000 tokens of general text",
              "; 2 texts that do not fit the model are left out"])):
        data = _data(task, metric, **{metric: 0.5, "num_left_out": 3, **metrics}) | {"about": "<b> & more"}
        (tmp_path / "report.json").write_text(json.dumps(data))
        (tmp_path / "picture.png").write_bytes(b"")
        console = Console(record=True, width=160)
        print_tables(tmp_path / "report.json", console)
        shown, page = console.export_text(), _page(data, tmp_path / "picture.png")
        assert "<b> & more" in shown and "&lt;b&gt; &amp; more" in page
        told += ["3 test examples that do not fit the model are left out"]
        assert all(text in shown and text in page for text in told), shown


@pytest.mark.parametrize(("task", "metric", "dense", "students", "told"), [
    ("gsm8k", "exact_match", 0.5, [0.1, 0.6, 0.55], "worse at the task (0.500) than kd (0.600)"),
    ("gsm8k", "exact_match", 0.5, [0.1, 0.5, 0.2], ""),
    ("speech", "wer", 0.5, [0.9, 0.6, 0.4], "worse at the task (0.500) than squarehead (0.400)"),
    ("speech", "wer", 0.5, [0.9, 0.6, 0.5], ""),
    ("text", "perplexity", None, [9.0, None, 7.0], "")])
def test_a_teacher_that_is_worse_than_its_students_is_noted(task, metric, dense, students, told, tmp_path):
    settings = {"shots": 0, "bleu_signature": "", "exact_match_flexible": 0.0, "wer_normalised": 0.0, "cer": 0.0,
                "cer_normalised": 0.0, "cross_entropy": 1.0}
    data = _data(task, metric, **{metric: dense, **settings})
    for loss, value in zip(("one-shot", "kd", "squarehead"), students, strict=True):
        more = _data(task, metric, **{metric: value, **settings})["scores"]
        data["scores"] += [row | {"loss": loss, "sparsity": 0.5} for row in more]
    # What the compressed model scores is no student's.
    data["scores"] += [row | {"engine": "runtime int8"}
                       | ({"value": 0.99 if task == "gsm8k" else 0.01} if row["metric"] == metric else {})
                       for row in data["scores"] if row["loss"] == "dense"]
    (tmp_path / "report.json").write_text(json.dumps(data))
    (tmp_path / "picture.png").write_bytes(b"")
    console = Console(record=True, width=200)
    print_tables(tmp_path / "report.json", console)
    for shown in (console.export_text(), _page(data, tmp_path / "picture.png")):
        assert told in shown and ("worse at the task" in shown) == bool(told)


def _speed(milliseconds=1.0, spread=0.1, bound=0.5):
    return {"model": "m", "what": "linears", "engine": "sparse", "precision": "fp32", "sparsity": 0.5,
            "milliseconds": milliseconds, "low": milliseconds, "high": milliseconds * (1 + spread), "speedup": 1.0,
            "fraction_of_byte_bound": bound}


@pytest.mark.parametrize(("row", "backend", "marked", "told"), [
    (_speed(), "avx512", [], []), (_speed(spread=0.49, bound=1.0), "avx512", [], []),
    (_speed(spread=19.0), "avx512", ["1900%!"], ["too busy to measure"]),
    (_speed(bound=1.21), "avx512", ["1.21!"], ["too busy to measure"]),
    (_speed(spread=0.6, bound=2), "portable", ["60%!", "2.00!"], ["too busy to measure", "dense torch may be faster"]),
    (_speed(), "portable", [], ["dense torch may be faster"])])
def test_what_is_doubtful_is_marked_and_explained_in_a_line(tmp_path, row, backend, marked, told):
    data = _data("gsm8k", "exact_match", exact_match=0.5, exact_match_flexible=0.5, shots=1, cross_entropy=1.0)
    data["speed"], data["machines"][0]["backend"] = [row], backend
    (tmp_path / "report.json").write_text(json.dumps(data))
    (tmp_path / "picture.png").write_bytes(b"")
    console = Console(record=True, width=160)
    print_tables(tmp_path / "report.json", console)
    shown, page = console.export_text(), _page(data, tmp_path / "picture.png")
    assert [cell for cell in shown.split() if cell.endswith("!") and cell != "!"] == marked, shown
    for text in ("too busy to measure", "dense torch may be faster"):
        assert (text in shown, text in page) == (text in told,) * 2, text


def _decoded(family, example):
    size = ModelConfig(family=family, d_model=32, n_layers=2, window_seconds=0.4, max_seq_len=128)
    processor = build_processor(size, tiny_tokenizer())
    model = build_model(size, processor).eval()
    return model, decode_rows({("m", "torch", "fp32", 0.0): Runtime(model, processor)}, example, 3, 1, 1e9)[0]


def test_what_runs_once_per_answer_is_not_counted_per_token():
    for family, encoder, cross, example in (
            ("t5", "encoder.", ("EncDecAttention.k.", "EncDecAttention.v."), Example("one", "eins")),
            ("whisper", "model.encoder.", ("encoder_attn.k_proj.", "encoder_attn.v_proj."),
             Example("", "1", lambda rate: torch.zeros(1600).numpy()))):
        model, row = _decoded(family, example)
        own = {id(p): p.nbytes for name, p in model.named_parameters()
               if not name.startswith(encoder) and not any(part in name for part in cross)}
        assert row["bytes"] == sum(own.values()), family
        assert row["outside_products"] < 1, family


def test_a_text_is_prompted_with_its_own_beginning():
    model, row = _decoded("mpt", Example("", "a text without a prompt"))
    assert row["tokens_per_second"] > 0 and row["first_token_milliseconds"] > 0 and row["outside_products"] < 1
    assert row["bytes"] == sum(p.nbytes for p in model.parameters())  # the embedding is the head
