"""docs/models.md is true: what works of each type of model is seen here again."""

import pytest

from sparse_train.config import ModelConfig
from sparse_train.models import build_model, build_processor, save_model
from tests.model_types import answer, check, older_cell, older_python, read_by_older, rows, sweep
from tests.models import tiny_tokenizer


@pytest.mark.parametrize("model_type", ["gpt_neox", "qwen3_moe", "marian", "falcon_h1", "diffllama"])
def test_a_type_works_to_the_bit(model_type, tmp_path):
    assert check(model_type, tmp_path) == "" and rows()[model_type][0] == "works"


def test_a_type_is_refused_in_the_line_of_the_table(tmp_path):
    assert sweep(tmp_path, ["gpt2"]) == {"gpt2": rows()["gpt2"][0]}


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    root = tmp_path_factory.mktemp("types")
    return root, sweep(root)


@pytest.mark.slow
def test_every_type_is_as_the_table_says(swept):
    assert swept[1] == {model_type: cells[0] for model_type, cells in rows().items()}


@pytest.mark.slow
def test_transformers_4_reads_our_exports_as_the_table_says(swept, tmp_path):
    root, _ = swept
    tokenizer = tiny_tokenizer()
    config = ModelConfig(family="t5-gated", d_model=32, n_layers=2, n_heads=4)
    model = build_model(config, build_processor(config, tokenizer)).eval()
    # Version 4 scales in front of a tied head; this one is tied, and nothing is scaled.
    save_model(root / "t5 1.1" / "dense", model, tokenizer)
    answer(model, root / "t5 1.1")
    try:
        python = older_python(tmp_path)
    except OSError as error:
        pytest.skip(str(error))
    found = read_by_older(root, python)
    assert found.pop("t5 1.1") == "same"
    assert found.pop("tokenizer") == tokenizer("Tom has 3 eggs")["input_ids"]
    assert {model_type: older_cell(found.get(model_type)) for model_type in rows()} == {
        model_type: cells[1] for model_type, cells in rows().items()}
