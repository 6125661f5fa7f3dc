"""Tasks with data of their own kind: pairs, sound, text; what is unusable is counted, named and bounded."""

import io
import json
import logging
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sparse_train.config import EvaluateConfig, ModelConfig, TaskConfig
from sparse_train.errors import UserError
from sparse_train.models import build_model, build_processor
from sparse_train.tasks import build_task, generate, training_examples
from sparse_train.tasks.batch import collate, windows
from sparse_train.tasks.speech import normalise
from tests.models import tiny_tokenizer

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
        _task("translation", file)
    assert "1 of 100 rows left out" in caplog.text and "line 100: no text in column 'de'" in caplog.text
    with pytest.raises(UserError, match=r"1 of 100 rows cannot be used, more than task.max_bad_share=0: .*line 100"):
        _task("translation", file, max_bad_share=0)


def test_a_template_with_an_unknown_column_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"task.prompt='\{quelle\}': 'quelle' is no column; use \{source\}, \{target\}"):
        _task("translation", _pairs(tmp_path, ["a\tb"]), prompt="{quelle}")


@pytest.mark.parametrize("name", ["gsm8k", "translation", "speech", "text"])
def test_an_unknown_path_is_one_line(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="there is no such file or folder"):
        _task(name, "./nowhere")
    with pytest.raises(UserError, match=r"nobody/nothing is no file or folder, and no data set that can be loaded"):
        _task(name, "nobody/nothing")


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


def _sound(seconds, rate=8000):
    opened = io.BytesIO()
    soundfile.write(opened, np.sin(np.arange(int(seconds * rate)) / 5), rate, format="WAV")
    return opened.getvalue()


def _speech(folder, rows, archived=False):
    (folder / "index.tsv").write_text("file\ttext\tsplit\n" + "".join("\t".join(row[:3]) + "\n" for row in rows))
    with zipfile.ZipFile(folder / "clips.zip", "w") as archive:
        for name, _, _, data in rows:
            if archived:
                archive.writestr(name, data)
            else:
                (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("archived", [False, True])
def test_clips_are_read_resampled_and_masked(archived, tmp_path):
    folder = _speech(tmp_path, [("a.wav", "one", "train", _sound(0.2)), ("b.wav", "two", "train", _sound(0.1)),
                                ("c.wav", "three", "test", _sound(0.1)), ("d.wav", "four", "train", _sound(1.5))],
                     archived)
    task = _task("speech", folder)
    processor = build_processor(ModelConfig(family="whisper", d_model=32, window_seconds=0.4), tiny_tokenizer())
    examples, num_left_out = training_examples(task, processor, None)
    assert num_left_out == 1 and {e.answer for e in examples} == {"one", "two"}
    assert [len(e.sound(16000)) for e in sorted(examples, key=lambda e: e.answer)] == [3200, 1600]
    batch = collate(sorted(examples, key=lambda e: e.answer), processor)
    assert batch.encoder.inputs.shape == (2, 80, 40) and batch.encoder.attend.sum(1).tolist() == [10, 5]
    assert (batch.labels == batch.targets).all() and batch.input_ids[0, 0] == processor.decoder_prefix[0]


def test_sound_over_the_window_is_answered_window_by_window(tmp_path):
    processor = build_processor(config := ModelConfig(family="whisper", d_model=32, n_layers=1, window_seconds=0.4),
                                tiny_tokenizer())
    rows = [("a.wav", "one", "test", _sound(1.0)), ("b.wav", "two", "test", _sound(0.3)),
            ("c.wav", "two", "train", _sound(0.1))]
    task, model = _task("speech", _speech(tmp_path, rows)), build_model(config, processor).eval()
    examples, spec = task.examples("test"), EvaluateConfig(max_new_tokens=3)
    long = next(e for e in examples if e.answer == "one")
    pieces = windows(long, processor)
    assert [len(piece.sound(16000)) for piece in pieces] == [6400, 6400, 3200]
    assert generate(model, processor, [long], spec) == [" ".join(generate(model, processor, pieces, spec))]
    short = [e for e in examples if e.answer == "two"]
    assert task.score(model, processor, examples, spec).metrics["cross_entropy"] == pytest.approx(
        task.score(model, processor, short, spec).metrics["cross_entropy"], rel=1e-5)


@pytest.mark.parametrize("row, why", [
    (("x.wav", "text", "train", b"RIFFnothing"), "x.wav does not decode as audio"),
    (("x.wav", " ", "train", _sound(0.1)), "column 'text' is empty"),
    (("../x.wav", "text", "train", None), "there is no ../x.wav"),
])
def test_bad_clips_are_named(row, why, tmp_path):
    folder = _speech(tmp_path, [("a.wav", "one", "train", _sound(0.1)), (*row[:3], row[3] or b"")] if row[3] else
                     [("a.wav", "one", "train", _sound(0.1))])
    if row[3] is None:
        with open(folder / "index.tsv", "a") as file:
            file.write("\t".join(row[:3]) + "\n")
    with pytest.raises(UserError, match=f"1 of 2 rows cannot be used.*{why}"):
        _task("speech", folder)


def test_error_rates_with_and_without_normalisation():
    found = _task("dialtones").measure([{"answer": "Eins, zwei!", "prediction": "eins zwei"},
                                        {"answer": "drei", "prediction": "vier"}])
    assert found["wer"] == pytest.approx(1.0) and found["wer_normalised"] == pytest.approx(1 / 3)
    assert normalise("नमस्ते, दुनिया!") == "नमस्ते दुनिया"


def test_dial_tones_are_seeded_and_as_long_as_they_say():
    task = _task("dialtones")
    first, again = task.examples("train")[3], task.examples("train")[3]
    assert np.array_equal(first.sound(16000), again.sound(16000)) and first.answer == again.answer
    assert max(len(task.examples("train")[i].sound(16000)) for i in range(100)) <= 16000


def test_text_is_cut_into_pieces_that_lose_nothing(tmp_path):
    words = [f"w{i}" for i in range(3000)]
    (tmp_path / "a.txt").write_text("\n\n".join(" ".join(words[i:i + 30]) for i in range(0, 3000, 30)))
    task = _task("text", tmp_path, max_length=200, test_share=0.2)
    pieces = [e.answer for split in ("train", "test") for e in task.examples(split)]
    assert sorted(" ".join(pieces).split()) == sorted(words) and max(map(len, pieces)) <= 400
    assert all(len(task.examples(split)) for split in ("train", "test"))


@pytest.mark.skipif(not _DATA.is_dir(), reason=f"needs {_DATA}")
def test_the_shared_data_is_read():
    pairs = _task("translation", _DATA / "tatoeba_en_de", test_share=0.02)
    assert len(pairs.examples("train")) + len(pairs.examples("test")) == 169_813
    digits = _task("speech", _DATA / "fsdd")
    assert len(digits.examples("train")) == 2700 and len(digits.examples("test")) == 300
    assert len(_task("text", _DATA / "books" / "books.txt.xz").examples("test", 50)) == 50
