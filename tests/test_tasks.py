"""Tasks: what the examples are, what a batch holds, what counts as right; generation with left padding."""

import functools
import gzip
import json
import re
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from sparse_train.config import EvaluateConfig, TaskConfig
from sparse_train.errors import UserError
from sparse_train.models import Processor
from sparse_train.tasks import build_task, build_tokenizer, generate, training_examples
from sparse_train.tasks.batch import Example, collate, encode
from sparse_train.tasks.gsm8k import final_number, last_number
from tests.models import tiny_mpt

_GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k"


@functools.cache
def _arithmetic():
    task = build_task(TaskConfig())
    return task, Processor(build_tokenizer(task, 320))


def test_arithmetic_is_gsm8k_shaped_and_every_step_is_true():
    task, _ = _arithmetic()
    for example in task.examples("train", 300):
        assert re.fullmatch(r"Question: .+\?\nAnswer:", example.prompt)
        lines = example.answer[1:].split("\n")
        assert re.fullmatch(r"#### \d+", lines[-1]) and len(lines) == 3
        for line in lines[:-1]:
            text, inside, result, shown = re.fullmatch(r"(.+)=<<(.+)=(\d+)>>(\d+)", line).groups()
            assert text == inside and result == shown and eval(text) == int(result)
        assert lines[-2].endswith(f">>{lines[-1].removeprefix('#### ')}")


def test_arithmetic_is_seeded_endless_and_its_splits_are_disjoint():
    train, test = (_arithmetic()[0].examples(split, 2000) for split in ("train", "test"))
    assert [train[i] for i in range(5)] == [_arithmetic()[0].examples("train")[i] for i in range(5)]
    assert _arithmetic()[0].endless and _arithmetic()[0].examples("train")[10**12].prompt
    assert not {example.prompt for example in train} & {example.prompt for example in test}
    with pytest.raises(IndexError):
        train[2000]


def test_a_tokenizer_loses_nothing_and_splits_digits():
    tokenizer = _arithmetic()[1].tokenizer
    text = "Tom has 127 ünïcode 苹果;\n  <<2*3=6>>6"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert [tokenizer.decode([i]) for i in tokenizer.encode("127")] == ["1", "2", "7"]
    assert len(tokenizer) <= 320


def test_a_batch_labels_the_answer_and_the_end_only():
    _, processor = _arithmetic()
    examples = [Example("Question: a\nAnswer:", " 12"), Example("Q", " 3")]
    batch = collate(examples, processor)
    for row, example in enumerate(examples):
        prompt, answer = encode(example, processor)
        length = len(prompt) + len(answer)
        assert batch.attend[row].tolist() == [i < length for i in range(batch.attend.shape[1])]
        assert batch.input_ids[row, :length].tolist() == prompt + answer
        assert batch.labels[row, len(prompt):length].tolist() == answer
        assert answer[-1] == processor.tokenizer.eos_token_id
        assert (batch.labels[row] != -100).sum() == len(answer)


def test_no_examples_make_a_row_that_counts_nowhere():
    batch = collate([], _arithmetic()[1])
    assert batch.input_ids.shape[0] == 1 and not batch.attend.any() and (batch.labels == -100).all()


@pytest.mark.parametrize("text, strict, last", [
    ("6*2=12\n#### 12", "12", "12"), ("#### 1,200.", "1200", "1200"), ("#### -5", "-5", "-5"),
    ("it is 7 or 8", None, "8"), ("", None, None), ("#### $5", None, "5"),
])
def test_numbers_are_extracted_as_by_the_usual_harness(text, strict, last):
    assert final_number(text) == strict and last_number(text) == last


def _padded_model():
    torch.manual_seed(3)
    return tiny_mpt(vocab_size=320).eval()


def test_generation_with_left_padding_is_generation_one_at_a_time():
    task, processor = _arithmetic()
    examples = [task.examples("test")[0], Example("Question: 1\nAnswer:", " 1"), Example("A", " 1")]
    model, spec = _padded_model(), EvaluateConfig(max_new_tokens=12)
    together = generate(model, processor, examples, spec)
    assert together == [generate(model, processor, [example], spec)[0] for example in examples]


def test_the_score_counts_right_answers_and_real_target_tokens():
    task, processor = _arithmetic()
    model = _padded_model()
    examples = [Example(f"Question: {'x' * n}\nAnswer:", f" {n}") for n in (1, 5, 3)]
    done = []
    spec = EvaluateConfig(batch_size=2, max_new_tokens=8)
    score = task.score(model, processor, examples, spec, lambda *state: done.append(state))
    total = count = 0
    for example in examples:
        prompt, answer = encode(example, processor)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
        total += functional.cross_entropy(logits[len(prompt) - 1:-1], torch.tensor(answer), reduction="sum").item()
        count += len(answer)
    assert score.metrics["cross_entropy"] == pytest.approx(total / count, rel=1e-4)
    assert [sample["prompt"] for sample in score.samples] == [example.prompt for example in examples]
    assert score.metrics["exact_match"] == sum(s["correct"] for s in score.samples) / 3 and done == [(2, 3), (3, 3)]


def _folder(tmp_path, lines, gz=False):
    for split in ("train", "test"):
        text = "".join(line + "\n" for line in lines)
        if gz:
            (tmp_path / f"{split}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
        else:
            (tmp_path / f"{split}.jsonl").write_text(text)
    return TaskConfig(name="gsm8k", path=str(tmp_path))


_LINES = [json.dumps({"question": f"q{i}", "answer": f"a{i}\n#### {i}"}) for i in range(4)]


@pytest.mark.parametrize("gz", [False, True])
def test_gsm8k_reads_a_folder_plain_or_zipped(gz, tmp_path):
    task = build_task(_folder(tmp_path, _LINES, gz))
    assert len(task.examples("train")) == 4 and len(task.examples("test", 3)) == 3
    assert task.examples("train")[2] == Example("Question: q2\nAnswer:", " a2\n#### 2")


@pytest.mark.parametrize("bad, why", [('{"question": "x"}', "no text in column 'answer'"), ("{", "no JSON"),
                                      ("[1]", "no JSON object")])
def test_a_bad_line_is_named(bad, why, tmp_path):
    with pytest.raises(UserError, match=rf"1 of 5 rows cannot be used.*train\.jsonl line 5: {why}"):
        build_task(_folder(tmp_path, [*_LINES, bad]))


def test_a_damaged_gz_is_named(tmp_path):
    config = _folder(tmp_path, _LINES, gz=True)
    (tmp_path / "train.jsonl.gz").write_bytes((tmp_path / "train.jsonl.gz").read_bytes()[:-9])
    with pytest.raises(UserError, match=r"train\.jsonl\.gz"):
        build_task(config)


def test_examples_over_the_length_are_left_out_and_counted(tmp_path):
    task = build_task(_folder(tmp_path, [*_LINES, json.dumps({"question": "long " * 99, "answer": "#### 1"})])
                      .model_copy(update={"max_length": 40}))
    examples, num_left_out = training_examples(task, _arithmetic()[1], None)
    assert len(examples) == 4 and num_left_out == 1


@pytest.mark.skipif(not _GSM8K.is_dir(), reason=f"needs the GSM8K files in {_GSM8K}")
def test_the_real_gsm8k_has_its_known_size():
    task = build_task(TaskConfig(name="gsm8k", path=str(_GSM8K)))
    assert len(task.examples("train")) == 7473 and len(task.examples("test")) == 1319
    assert all(final_number(example.answer) for example in task.examples("test"))
