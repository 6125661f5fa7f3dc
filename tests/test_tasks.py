"""Tasks: what the examples are, what a batch holds, what counts as right; generation with left padding."""

import functools
import gzip
import json
import logging
import re
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import sentencepiece
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from sparse_train.config import EvaluateConfig, RunConfig, Section, TaskConfig
from sparse_train.errors import UserError
from sparse_train.launch.submit.validate import validate
from sparse_train.models import Processor, load_processor
from sparse_train.registry import TASKS, Registry, TaskEntry
from sparse_train.tasks import build_task, build_tokenizer, generate, in_order, scored_examples, training_examples
from sparse_train.tasks.arithmetic import Arithmetic
from sparse_train.tasks.batch import Example, collate, encode
from sparse_train.tasks.gsm8k import final_number, last_number
from tests.models import tiny_mpt

_GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k"


@functools.cache
def _arithmetic():
    task = build_task(TaskConfig())
    return task, Processor(build_tokenizer(task, 320), num_embedded=320)


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


def test_a_prompt_starts_with_what_the_tokenizer_puts_before_any_text():
    """Llama's beginning-of-text, which a pretrained model has always seen; in front of the answer there is none."""
    tokenizer = build_tokenizer(_arithmetic()[0], 320)
    example = Example("Question: a\nAnswer:", " 12")
    bare = encode(example, Processor(tokenizer))
    start = tokenizer.pad_token_id
    started = build_tokenizer(_arithmetic()[0], 320)
    started.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.pad_token} $A", special_tokens=[(tokenizer.pad_token, start)])
    assert encode(example, Processor(started)) == ([start, *bare[0]], bare[1])
    assert encode(Example("", " 12"), Processor(started))[0] == [start]
    batch = collate([example], Processor(started))
    assert batch.input_ids[0].tolist() == [start, *bare[0], *bare[1]] and batch.labels[0, len(bare[0])] == -100
    # An encoder's text has none, as T5's.
    assert start not in encode(example, Processor(started, (0,)))[0]


def _kinds():
    """Byte-level as GPT-2's, and with a space in front; sentencepiece's two, by a pre-tokenizer and, as Llama 2's, by a
    normalizer."""
    texts = [f"{example.prompt}{example.answer}" for example in _arithmetic()[0].examples("train", 100)]
    for pre, prefix in ((pre_tokenizers.ByteLevel(add_prefix_space=False), ""),
                        (pre_tokenizers.ByteLevel(add_prefix_space=True), ""),
                        (pre_tokenizers.Metaspace(prepend_scheme="always"), ""), (None, "\u2581")):
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        if pre:
            tokenizer.pre_tokenizer = pre
        else:
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(prefix),
                                                         normalizers.Replace(" ", prefix)])
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["</s>", "<unk>"], show_progress=False,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        tokenizer.train_from_iterator(texts if pre else [word for text in texts for word in text.split()], trainer)
        yield PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def test_prompt_and_answer_are_the_tokens_of_the_joined_text_whatever_the_tokenizer():
    pairs = [("Question: Tom has 3 eggs?\nAnswer:", " 12+3=15\n#### 15"), ("Q: eggs A: ", "boxes and 3"),
             ("Tom buys 3\n", "eggs left"), ("", " 12 boxes"), ("Tom has  ", "  3")]
    num_otherwise = 0
    for tokenizer in _kinds():
        processor = Processor(tokenizer)
        for prompt, answer in pairs:
            start, rest = encode(Example(prompt, answer), processor)
            assert start + rest == [*tokenizer.encode(prompt + answer), tokenizer.eos_token_id], (prompt, answer)
            assert start == encode(Example(prompt, ""), processor)[0]  # generation knows no answer
            num_otherwise += start + rest != [*tokenizer.encode(prompt), *tokenizer.encode(answer), 0]
        # Where a token spans the boundary, the answer goes on without a space that is in neither text.
        start, rest = encode(Example("bo", "xes"), processor)
        told = "".join(tokenizer.convert_ids_to_tokens(start + rest[:-1]))
        assert told.lstrip("\u2581\u0120") == "boxes" and start == encode(Example("bo", ""), processor)[0]
    assert num_otherwise >= 8  # so tokenising them apart is no substitute


def test_a_tokenizer_that_is_a_sentencepiece_file_only_is_read(tmp_path):
    text = [example.prompt for example in _arithmetic()[0].examples("train", 200)]
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text), model_prefix=str(tmp_path / "spiece"),
                                             vocab_size=100, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    (tmp_path / "spiece.vocab").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "decoder_start_token_id": 0,
                                                      "is_encoder_decoder": True}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    processor = load_processor(tmp_path)
    prompt, answer = encode(Example("Question: 12 apples", "12"), processor)
    assert processor.tokenizer.decode(prompt[:-1]) == "Question: 12 apples" and prompt[-1] == answer[-1] == 1


def test_no_examples_make_a_row_that_counts_nowhere():
    batch = collate([], _arithmetic()[1])
    assert batch.input_ids.shape[0] == 1 and not batch.attend.any() and (batch.labels == -100).all()


@pytest.mark.parametrize("text, strict, last", [
    ("6*2=12\n#### 12", "12", "12"), ("#### 1,200.", "1200", "1200"), ("#### -5", "-5", "-5"),
    ("it is 7 or 8", None, "8"), ("", None, None), ("#### $5", None, "5"), ("costs .50", None, ".50"),
    ("answer: 3,", None, "3"), ("#### 1,200.50.", "1200.50", "1200.50"), ("so 5-3=2 left...", None, ".."),
    ("is $5, ok.", None, "5"), ("2-7", None, "-7"), ("#### 5..", "5.", "5."),
])
def test_numbers_are_extracted_as_by_the_usual_harness(text, strict, last):
    assert final_number(text) == strict and last_number(text) == last


def test_a_sample_tells_both_ways_of_counting_and_no_number_is_never_right():
    samples = [{"answer": " so\n#### 1,000", "prediction": said} for said in
               ("#### 1000", "it is $1000.", "none", "#### 1000\nQuestion: 5?")]
    assert _arithmetic()[0].measure(samples) == {"exact_match": 0.5, "exact_match_flexible": 0.75, "shots": 0}
    assert [sample["correct_flexible"] for sample in samples] == [True, True, False, True]
    assert _arithmetic()[0].measure([{"answer": "many", "prediction": "few"}])["exact_match"] == 0


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
    in_batches = functools.partial(in_order, progress=lambda *state: done.append(state))
    score = task.score(model, processor, examples, spec, in_batches)
    total = count = 0
    for example in examples:
        prompt, answer = encode(example, processor)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0]
        total += functional.cross_entropy(logits[len(prompt) - 1:-1], torch.tensor(answer), reduction="sum").item()
        count += len(answer)
    assert score.metrics["cross_entropy"] == pytest.approx(total / count, rel=1e-4)
    assert [sample["prompt"] for sample in score.samples] == [example.prompt for example in examples]
    assert score.metrics["exact_match"] == sum(s["correct"] for s in score.samples) / 3 and done == [(1, 2), (2, 2)]


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
                                      ("[1]", "no JSON object"), pytest.param("[" * 100_000, "no JSON", id="deep")])
def test_a_bad_line_is_named(bad, why, tmp_path):
    with pytest.raises(UserError, match=rf"1 of 5 rows cannot be used.*train\.jsonl line 5: {why}"):
        build_task(_folder(tmp_path, [*_LINES, bad])).examples("train")


def test_a_damaged_gz_is_named(tmp_path):
    config = _folder(tmp_path, _LINES, gz=True)
    (tmp_path / "train.jsonl.gz").write_bytes((tmp_path / "train.jsonl.gz").read_bytes()[:-9])
    with pytest.raises(UserError, match=r"train\.jsonl\.gz"):
        build_task(config).examples("train")


def test_examples_over_the_length_are_left_out_counted_and_named(tmp_path, caplog):
    task = build_task(_folder(tmp_path, [json.dumps({"question": "long " * 99, "answer": "#### 1"}), *_LINES])
                      .model_copy(update={"max_length": 40}))
    with caplog.at_level(logging.WARNING):
        examples, num_left_out = training_examples(task, _arithmetic()[1], None)
    assert len(examples) == 4 and num_left_out == 1
    assert "1 of the first 5 training examples are longer than task.max_length=40" in caplog.text
    assert "'Question: long long" in caplog.text
    # As many as are asked for are left when the long ones are gone.
    examples, num_left_out = training_examples(task, _arithmetic()[1], 2)
    assert [example.prompt for example in examples] == ["Question: q0\nAnswer:", "Question: q1\nAnswer:"]
    assert num_left_out == 1


def test_examples_without_a_position_for_each_token_are_left_out_counted_and_named(tmp_path, caplog):
    long = [json.dumps({"question": "long " * words, "answer": "a " * more}) for words, more in ((6, 1), (1, 50))]
    task = build_task(_folder(tmp_path, [*long, *_LINES]))
    processor = replace(_arithmetic()[1], positions=40)
    needed = [sum(map(len, encode(example, processor))) for example in task.examples("train")]
    assert needed[1] > 40 and max(needed[2:]) <= needed[0] <= 40
    # Trained on is what has a position itself; scored, what leaves some to answer as well.
    assert training_examples(task, processor, None)[1] == 1
    with caplog.at_level(logging.WARNING):
        examples, num_left_out = scored_examples(task, processor, EvaluateConfig(num_examples=2, max_new_tokens=15))
    assert num_left_out == 2 and [example.answer[:3] for example in examples] == [" a0", " a1"]
    assert ("2 of the first 4 test examples do not fit the model (40 positions, 320 embedded token ids; "
            "15 new tokens): 'Question: long") in caplog.text
    with pytest.raises(UserError, match=r"no test example is left: 6 of the first 6 .*\(evaluate.max_new_tokens"):
        scored_examples(task, processor, EvaluateConfig(max_new_tokens=39))
    # A token that the embedding lacks, such as one for images that the tokenizer knows of.
    task = build_task(_folder(tmp_path, [json.dumps({"question": "see <image>", "answer": "a"}), *_LINES]))
    tokenizer = build_tokenizer(_arithmetic()[0], 320)
    tokenizer.add_tokens(["<image>"])
    assert training_examples(task, replace(_arithmetic()[1], tokenizer=tokenizer, num_embedded=320), None)[1] == 1


@pytest.mark.parametrize("num_examples", [None, 3])
def test_no_example_left_is_one_line(num_examples, tmp_path):
    for task in [build_task(_folder(tmp_path, _LINES).model_copy(update={"max_length": 2})),
                 *([build_task(TaskConfig(max_length=2))] if num_examples else [])]:
        with pytest.raises(UserError, match=r"no training example is left: .* longer than task.max_length=2 tokens"):
            training_examples(task, _arithmetic()[1], num_examples)


def test_an_endless_task_that_does_not_fit_the_model_is_one_line():
    task, processor = _arithmetic()
    longest = max(sum(map(len, encode(example, processor))) for example in task.examples("train", 100))
    assert training_examples(task, replace(processor, positions=longest), None)[1] == 0
    with pytest.raises(UserError, match=rf"task.name=arithmetic do not fit the model \({longest - 1} positions"):
        training_examples(task, replace(processor, positions=longest - 1), None)


def test_solved_examples_have_the_template_of_the_test(tmp_path):
    config = _folder(tmp_path, _LINES).model_copy(update={
        "prompt": "{question}", "answer": "{answer}", "test_prompt": "Q: {question} A: ", "shots": 2})
    task = build_task(config)
    assert task.examples("test")[1].prompt == "Q: q0 A: a0\n#### 0\n\nQ: q1 A: a1\n#### 1\n\nQ: q1 A: "
    assert task.examples("train")[0] == Example("q0", "a0\n#### 0")
    with pytest.raises(UserError, match=r"task.test_prompt='\{q\}'"):
        build_task(config.model_copy(update={"test_prompt": "{q}"})).examples("test")


def test_a_split_is_read_when_it_is_asked_for_and_may_have_another_name(tmp_path):
    config = _folder(tmp_path, _LINES)
    (tmp_path / "test.jsonl").rename(tmp_path / "more.jsonl")
    task = build_task(config)
    assert len(task.examples("train")) == 4
    with pytest.raises(UserError, match=r"holds no test\.jsonl"):
        task.examples("test")
    both = build_task(config.model_copy(update={"train_split": "train+more", "test_split": "more"}))
    assert len(both.examples("train")) == 8 and len(both.examples("test")) == 4
    (tmp_path / "more.jsonl").write_text("")
    with pytest.raises(UserError, match=r"has no row of the test split; see task.test_split \(more\)"):
        build_task(both.config).examples("test")


@pytest.mark.skipif(not _GSM8K.is_dir(), reason=f"needs the GSM8K files in {_GSM8K}")
def test_the_real_gsm8k_has_its_known_size():
    task = build_task(TaskConfig(name="gsm8k", path=str(_GSM8K)))
    assert len(task.examples("train")) == 7473 and len(task.examples("test")) == 1319
    assert all(final_number(example.answer) for example in task.examples("test"))


class _Steps(Section):
    num_words: int = 2


class Echo(Arithmetic):
    """A task of another package."""

    Options = _Steps

    def read(self, split):
        return [Example("word " * self.options.num_words, "word")] * 10


def test_a_task_of_another_package_gets_its_own_options(monkeypatch):
    point = EntryPoint("echo", f"{__name__}:Echo", TASKS.group)
    registry = Registry("task", TASKS.group, TaskEntry, TASKS.entries)
    monkeypatch.setattr("sparse_train.registry.entry_points", lambda group: [point] if group == TASKS.group else [])
    monkeypatch.setitem(vars(TASKS), "entries", registry.entries)

    def run(name, options, **more):
        task = {"name": name, "options": options, **more}
        return RunConfig.model_validate({"task": task, "model": {"d_model": 32, "n_layers": 1, "max_seq_len": 512},
                                         "prune": {"sparsity": 0.5}})

    assert build_task(run("echo", {"num_words": 3}).task).examples("test")[0].prompt.split() == ["word"] * 3
    validate(run("echo", {"num_words": 3}))
    for name, options, message in (
            ("echo", {"num_words": "x"}, r"^task\.options\.num_words=x: give a whole number$"),
            ("echo", {"words": 1}, r"^there is no key task\.options\.words; .*valid here: num_words"),
            ("arithmetic", {"num_words": 1}, r"^task\.options: task\.name=arithmetic has no options of its own")):
        with pytest.raises(UserError, match=message):
            validate(run(name, options))
        with pytest.raises(UserError, match=message):  # without looking at the data, which is elsewhere
            validate(run(name, options, path="owner/data"), dry_run=True)
