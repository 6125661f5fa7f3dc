"""Tasks with data of their own kind: pairs and text; what is unusable is counted, named and bounded."""

import gzip
import json
import logging
import lzma
import zipfile
from pathlib import Path

import datasets
import pytest

from sparse_train.config import ModelConfig, RunConfig, TaskConfig
from sparse_train.errors import UserError
from sparse_train.jobs import prune as prune_job
from sparse_train.jobs.job import Input, Job
from sparse_train.jobs.stage import Kind, Stage
from sparse_train.models import build_model, build_processor, save_model
from sparse_train.tasks import build_task, build_tokenizer, read
from sparse_train.tasks.text import _pieces

_DATA = Path(__file__).parents[2] / "shared" / "data"


def _task(name, path=None, **more):
    return build_task(TaskConfig(name=name, path=None if path is None else str(path), **more))


def _pairs(folder, lines, name="pairs.tsv"):
    file = folder / name
    file.write_text("".join(f"{line}\n" for line in lines))
    return file


def test_pairs_are_split_by_source_sentence(tmp_path):
    lines = [f"sentence {i // 2}\tSatz {i}" for i in range(400)]
    with zipfile.ZipFile(tmp_path / "pairs.zip", "w") as archive:
        archive.writestr("_about.txt", "not data")
        archive.writestr("deu.txt", "\n".join(lines))
    task = _task("translation", tmp_path / "pairs.zip", test_share=0.2)
    train, test = task.examples("train"), task.examples("test")
    assert len(train) + len(test) == 400 and 20 < len(test) < 160
    assert not {e.prompt for e in train} & {e.prompt for e in test}
    assert train[0].prompt.startswith("translate English to German: sentence ")
    assert task.examples("test") == _task("translation", tmp_path / "pairs.zip", test_share=0.2).examples("test")


def test_json_pairs_and_given_splits_are_read(tmp_path):
    for split in ("train", "test"):
        rows = [json.dumps({"translation": {"en": f"{split} {i}", "de": f"{i}"}}) for i in range(3)]
        _pairs(tmp_path, rows, f"{split}.jsonl")
    task = _task("translation", tmp_path, prompt="{source} =", test_prompt="Q {source} =")
    assert [e.prompt for e in task.examples("train")] == ["train 0 =", "train 1 =", "train 2 ="]
    assert task.examples("test")[0].prompt == "Q test 0 ="


def test_a_missing_column_is_counted_named_and_bounded(tmp_path, caplog):
    file = _pairs(tmp_path, [*(f"a {i}\tb {i}" for i in range(99)), "alone"])
    with caplog.at_level(logging.WARNING):
        _task("translation", file).examples("train")
    assert "1 of 100 rows left out" in caplog.text and "line 100: no text in column 'de'" in caplog.text
    with pytest.raises(UserError, match=r"1 of 100 rows cannot be used, more than task.max_bad_share=0: .*line 100"):
        _task("translation", file, max_bad_share=0).examples("train")


def test_a_template_with_an_unknown_column_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"task.prompt='\{quelle\}': 'quelle' is no column; use \{source\}, \{target\}"):
        _task("translation", _pairs(tmp_path, ["a\tb"]), prompt="{quelle}").examples("train")
    with pytest.raises(UserError, match=r"task.prompt='.*udc00.*' has half of a surrogate pair"):
        _task("translation", _pairs(tmp_path, ["a\tb"]), prompt="{source} \udc00").examples("train")
    with pytest.raises(UserError, match=r"task.answer='\{target.x\}': .* is no column"):
        _task("translation", _pairs(tmp_path, ["a\tb"]), answer="{target.x}").examples("train")


@pytest.mark.parametrize("name", ["gsm8k", "translation", "speech", "text"])
def test_an_unknown_path_is_one_line(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="there is no such file or folder"):
        _task(name, "./nowhere")
    with pytest.raises(UserError, match=r"nobody/nothing is no file or folder, and no data set that can be loaded"):
        _task(name, "nobody/nothing").examples("train")


def _on_the_hub(monkeypatch, **splits):
    """load_dataset as the hub would answer it, without a network."""
    loaded = []

    def load_dataset(path, name=None, split=None):
        loaded.append(split)
        return datasets.concatenate_datasets([datasets.Dataset.from_list(splits[part]) for part in split.split("+")])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("datasets.get_dataset_split_names", lambda path, name=None: list(splits))
    return loaded


def _translations(split, count=50):
    return [{"translation": {"en": f"{split} {i:02}", "de": str(i)}} for i in range(count)]


def test_hub_pairs_are_made_when_asked_for_in_an_order_of_their_texts(monkeypatch):
    loaded = _on_the_hub(monkeypatch, train=_translations("a"), validation=_translations("b", 3))
    task = _task("translation", "who/what", test_split="validation")
    train = task.examples("train")
    assert loaded == ["train"]  # the other split is not asked for yet
    assert sorted(e.answer for e in train) == sorted(map(str, range(50)))
    assert [e.answer for e in train[:10]] != [str(i) for i in range(10)]
    assert not isinstance(train, list) and train[0] == train[:1][0] == next(iter(train))
    assert len(task.examples("test")) == 3 and loaded == ["train", "validation"]
    both = _task("translation", "who/what", train_split="train+validation")
    assert len(both.examples("train")) == 53


@pytest.mark.parametrize("bad", [{"translation": None}, {"other": "x"}, {"translation": {"en": "x", "de": None}}])
def test_bad_hub_pairs_are_named(bad, monkeypatch, caplog):
    rows = [row | dict.fromkeys(bad) | row for row in _translations("a", 3)]
    _on_the_hub(monkeypatch, train=[*rows, dict.fromkeys(rows[0]) | bad])
    with caplog.at_level(logging.WARNING):
        assert len(_task("translation", "who/what", max_bad_share=0.5).examples("train")) == 3
    assert "1 of 4 rows left out: who/what train 3: no text in column" in caplog.text


def test_the_cause_of_a_hubs_error_is_named(monkeypatch):
    def load_dataset(*args, **kwargs):
        try:
            raise ImportError("To support decoding audio data, please install 'torchcodec'.")
        except ImportError as error:
            raise RuntimeError("An error occurred while generating the dataset") from error

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(UserError, match="can be loaded: To support decoding audio data, please install 'torchcodec'"):
        _task("speech", "who/what").examples("train")


def test_a_json_line_whose_translation_is_no_mapping_is_named(tmp_path, caplog):
    file = _pairs(tmp_path, ['{"translation": "x"}', '{"en": "a", "de": "b"}'], "p.jsonl")
    with caplog.at_level(logging.WARNING):
        _task("translation", file, max_bad_share=0.5, test_share=1e-9).examples("train")
    assert "1 of 2 rows left out" in caplog.text and "line 1: no text in column 'en'" in caplog.text


def test_bleu_is_sacrebleus_and_signed():
    task = _task("numbers")
    samples = [{"answer": "das ist ein Haus am See", "prediction": "das ist ein Haus am See"}]
    found = task.measure(samples)
    assert found["bleu"] == pytest.approx(100) and "version:" in found["bleu_signature"]


def test_numbers_are_words_of_both_languages_and_never_repeat_over_splits():
    task = _task("numbers")
    train, test = (task.examples(split, 300) for split in ("train", "test"))
    assert train[0].prompt.startswith("translate English to German: ")
    assert not {e.prompt for e in train} & {e.prompt for e in test}
    assert train[5] == task.examples("train")[5]


def test_text_is_cut_into_pieces_that_lose_nothing(tmp_path):
    words = [f"w{i}" for i in range(3000)]
    (tmp_path / "a.txt").write_text("\n\n".join(" ".join(words[i:i + 30]) for i in range(0, 3000, 30)))
    task = _task("text", tmp_path, max_length=200, test_share=0.2)
    pieces = [e.answer for split in ("train", "test") for e in task.examples(split)]
    assert sorted(" ".join(pieces).split()) == sorted(words) and max(map(len, pieces)) <= 400
    assert all(len(task.examples(split)) for split in ("train", "test"))
    test = {word for e in _task("text", tmp_path, max_length=300, test_share=0.2).examples("test")
            for word in e.answer.split()}
    assert test == {word for e in task.examples("test") for word in e.answer.split()}


def test_text_with_splits_of_its_own_keeps_them(tmp_path, monkeypatch):
    for split in ("train", "test"):
        (tmp_path / f"{split}.txt").write_text(f"the {split} text")
    task = _task("text", tmp_path)
    assert [e.answer for e in task.examples("train")] == ["the train text"]
    assert [e.answer for e in task.examples("test")] == ["the test text"]
    rows = {split: [{"text": f"{split} {i}" if i % 2 else ""} for i in range(200)] for split in ("train", "test")}
    _on_the_hub(monkeypatch, **rows)
    task = _task("text", "who/what", max_length=20)
    assert all(e.answer.startswith("test") for e in task.examples("test"))
    assert all(e.answer.startswith("train") for e in task.examples("train"))
    _on_the_hub(monkeypatch, train=[{"text": f"train {i}"} for i in range(2000)])
    task = _task("text", "who/what", max_length=20, test_share=0.3)
    train, test = ({e.answer for e in task.examples(split)} for split in ("train", "test"))
    assert train and test and not train & test


def test_calibration_may_have_a_task_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "train.txt").write_text("How many are left? Tom buys shells and gives away coins.\n\n" * 200)
    (tmp_path / "test.txt").write_text("unused")
    tokenizer = build_tokenizer(build_task(TaskConfig()), 512)
    size = ModelConfig(d_model=32, n_layers=1, max_seq_len=256)
    processor = build_processor(size, tokenizer)
    save_model(tmp_path / "dense", build_model(size, processor), processor)
    real, given = prune_job.calibration_batches, []

    def seen(*arguments):
        given[:] = real(*arguments)
        return given

    monkeypatch.setattr(prune_job, "calibration_batches", seen)
    dense = Stage(Kind.DENSE, "dense", external=str(tmp_path / "dense"))
    stage, source = Stage(Kind.PRUNE, "prune", inputs=(dense,)), Input(dense, tmp_path / "dense")
    for calibration in (None, {"name": "text", "path": str(tmp_path), "max_length": 100}):
        config = RunConfig(prune={"sparsity": 0.5, "num_calibration": 4, "calibration": calibration})
        prune_job.run(Job(config, stage, tmp_path / str(calibration is None), (source,), lambda *_: None))
        texts = [tokenizer.decode(row) for batch in given for row in batch.input_ids]
        assert len(texts) == 4 and all(("Question" in text) == (calibration is None) for text in texts)


def test_half_a_surrogate_pair_is_a_bad_row_in_every_task(tmp_path, caplog):
    good, bad = r'{"question": "\ud83d\ude00?", "answer": "1"}', r'{"question": "\ud83d?", "answer": "1"}'
    for split in ("train", "test"):
        _pairs(tmp_path, [good, bad], f"{split}.jsonl")
    with caplog.at_level(logging.WARNING):
        examples = _task("gsm8k", tmp_path, max_bad_share=0.5).examples("train")
    assert [e.prompt for e in examples] == ["Question: \U0001f600?\nAnswer:"]
    assert "train.jsonl line 2: column 'question' has half of a surrogate pair" in caplog.text
    file = _pairs(tmp_path, [r'{"en": "a", "de": "b\udc00"}', r'{"en": "a", "de": "b"}'], "p.jsonl")
    assert len(_task("translation", file, max_bad_share=0.5, test_share=1e-9).examples("train")) == 1


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_blank_lines_are_no_rows(ending, tmp_path):
    row = '{"question": "q", "answer": "1"}'
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_bytes(ending.join([row, "", row, "  ", ""]).encode())
        (tmp_path / f"{split}.tsv").write_bytes(ending.join(["a\tb", "", "c\td", "", ""]).encode())
    assert len(_task("gsm8k", tmp_path, max_bad_share=0).examples("train")) == 2
    assert len(_task("translation", tmp_path, max_bad_share=0).examples("train")) == 2
    (tmp_path / "train.tsv").write_text("a\tb\n\t\n")  # a row whose columns are empty is a bad one
    with pytest.raises(UserError, match="column 'en' is empty"):
        _task("translation", tmp_path, max_bad_share=0).examples("train")


def test_what_systems_leave_beside_data_is_no_data(tmp_path):
    with zipfile.ZipFile(tmp_path / "pairs.zip", "w") as archive:
        for name in ("deu.txt", "__MACOSX/._deu.txt", ".hidden.txt", "__MACOSX/deu.txt"):
            archive.writestr(name, "a\tb\n" if name == "deu.txt" else b"\x00\x05\x16\xff")
    (tmp_path / "._pairs.tsv").write_bytes(b"\xff")
    assert len(_task("translation", tmp_path, test_share=1e-9).examples("train")) == 1
    text = tmp_path / ".data" / "text"  # dots above the folder say nothing
    for folder in (text, text / "__MACOSX", text / ".git"):
        folder.mkdir(parents=True)
    (text / "a.txt").write_text("the text")
    for name in ("._a.txt", "__MACOSX/a.txt", ".git/b.md"):
        (text / name).write_bytes(b"\xff")
    assert [e.answer for e in _task("text", text, test_share=1e-9).examples("train")] == ["the text"]


def test_text_of_one_line_is_cut_in_one_pass(tmp_path):
    class Counted(str):
        copied = 0

        def __getitem__(self, part):
            Counted.copied += len(found := str.__getitem__(self, part))
            return Counted(found)

    text = Counted("".join(f"w{i} " for i in range(9000)))
    pieces = list(_pieces([text, Counted("after")], 16))
    assert "".join(pieces[:-1]) + pieces[-1].replace("\n\n", "") == text + "after" and len(pieces) > 3000
    assert Counted.copied <= 2 * len(text)
    (tmp_path / "a.txt").write_text(text)
    assert "".join(_pieces([text.strip()], 1024)) == text.strip()


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress])
def test_what_unpacks_without_end_is_one_line(pack, tmp_path, monkeypatch):
    monkeypatch.setattr(read, "_UNPACKED", 1000)
    ending = {gzip.compress: "gz", lzma.compress: "xz"}[pack]
    for content in (b"a" * 10**6, b"\n" * 10**6):
        (tmp_path / f"train.txt.{ending}").write_bytes(pack(content))
        (tmp_path / "test.txt").write_text("test")
        with pytest.raises(UserError, match=rf"train\.txt\.{ending} unpacks to more than 250 times its size"):
            _task("text", tmp_path).examples("train")
    (tmp_path / "plain.txt").write_text("plain text " * 1000)  # whatever it says, it is as large as it is
    assert _task("text", tmp_path / "plain.txt").examples("train")
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", "a\tb\n" * 10**5)
    with pytest.raises(UserError, match=r"a\.txt unpacks to more than 250 times its size"):
        _task("translation", tmp_path / "a.zip").examples("train")


def test_a_row_has_a_longest_length_and_text_has_none(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "_LONGEST_ROW", 100)
    _pairs(tmp_path, ["a\tb", f"{'a' * 98}\tb"], "train.tsv")
    _pairs(tmp_path, ["a\tb"], "test.tsv")
    assert len(_task("translation", tmp_path).examples("train")) == 2
    _pairs(tmp_path, ["a\tb", f"{'a' * 99}\tb"], "train.tsv")
    with pytest.raises(UserError, match=r"train.tsv line 2 has more than 100 characters"):
        _task("translation", tmp_path).examples("train")
    (tmp_path / "long.txt").write_text("word " * 100)
    assert _task("text", tmp_path / "long.txt", test_share=1e-9).examples("train")


@pytest.mark.parametrize("name", ["a.txt", "train.txt"])
def test_text_outside_the_folder_is_not_read(name, tmp_path):
    folder, secret = tmp_path / "data", tmp_path / "secret.txt"
    folder.mkdir()
    secret.write_text("secret")
    (folder / "test.txt").write_text("the test")
    (folder / name).symlink_to(secret)
    with pytest.raises(UserError, match=rf"{name} is a link out of task.path="):
        _task("text", folder).examples("train")
    (folder / name).unlink()
    (folder / name).symlink_to("test.txt")  # inside
    assert _task("text", folder, test_share=1e-9).examples("train")
    secret_folder = tmp_path / "more"
    secret_folder.symlink_to(folder)  # the folder itself may be a link
    assert _task("text", secret_folder, test_share=1e-9).examples("train")


@pytest.mark.slow
@pytest.mark.skipif(not _DATA.is_dir(), reason=f"needs {_DATA}")
def test_the_shared_data_is_read():
    pairs = _task("translation", _DATA / "tatoeba_en_de", test_share=0.02)
    assert len(pairs.examples("train")) + len(pairs.examples("test")) == 169_813
    digits = _task("speech", _DATA / "fsdd")
    assert len(digits.examples("train")) == 2700 and len(digits.examples("test")) == 300
    assert len(_task("text", _DATA / "books" / "books.txt.xz").examples("test", 50)) == 50
