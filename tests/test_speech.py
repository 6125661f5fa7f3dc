"""Speech: clips from folders, archives and the hub; windows; error rates. What is unusable is counted and named."""

import io
import logging
import zipfile

import datasets
import numpy as np
import pyarrow
import pytest
import soundfile

from sparse_train.config import EvaluateConfig, ModelConfig, TaskConfig
from sparse_train.errors import UserError
from sparse_train.models import build_model, build_processor
from sparse_train.tasks import Example, build_task, generate, speech, training_examples
from sparse_train.tasks.batch import collate, windows
from sparse_train.tasks.speech import Sound, decoded, normalise
from tests.models import tiny_tokenizer


def _task(name, path=None, **more):
    return build_task(TaskConfig(name=name, path=None if path is None else str(path), **more))


def _sound(seconds, rate=8000, format="WAV"):
    opened = io.BytesIO()
    soundfile.write(opened, np.sin(np.arange(int(seconds * rate)) / 5) / 2, rate, format=format)
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
    processor, model = _tiny_whisper()
    rows = [("a.wav", "one", "test", _sound(1.0)), ("b.wav", "two", "test", _sound(0.3)),
            ("c.wav", "two", "train", _sound(0.1))]
    task = _task("speech", _speech(tmp_path, rows))
    examples, spec = task.examples("test"), EvaluateConfig(max_new_tokens=3)
    long = next(e for e in examples if e.answer == "one")
    pieces = windows(long, processor)
    assert sum(len(piece.sound(16000)) for piece in pieces) == 16000 and len(pieces) == 3
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
        _task("speech", folder).examples("train")


@pytest.mark.parametrize("format, why", [("WAV", "is shorter than it declares"), ("MP3", "is shorter than it declares"),
                                         ("FLAC", "does not decode as audio"), ("AIFF", "is shorter than it declares")])
def test_a_clip_whose_end_is_missing_is_named(format, why, tmp_path, caplog):
    whole = _sound(0.5, 16000, format)
    folder = _speech(tmp_path, [("a", "one", "train", whole), ("b", "two", "train", whole[:len(whole) // 2])])
    with caplog.at_level(logging.WARNING):
        assert len(_task("speech", folder, max_bad_share=0.5).examples("train")) == 1
    assert f"1 of 2 rows left out: {folder / 'index.tsv'} line 3: b {why}" in caplog.text


@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300, -1e30])
def test_sound_that_is_not_finite_is_a_bad_row(subtype, value, tmp_path, caplog):
    samples = np.zeros(200_000)
    samples[100_000] = value  # neither at the start nor at the end
    opened = io.BytesIO()
    soundfile.write(opened, samples, 8000, format="WAV", subtype=subtype)
    for archived in (False, True):
        folder = _speech(tmp_path, [("a.wav", "one", "train", _sound(0.1)), ("b.wav", "b", "train", opened.getvalue())],
                         archived)
        with caplog.at_level(logging.WARNING):
            assert len(_task("speech", folder, max_bad_share=0.5).examples("train")) == 1
        assert "line 3: b.wav has samples that are not finite, or far beyond" in caplog.text
        caplog.clear()
        (tmp_path / "b.wav").unlink(missing_ok=True)


@pytest.mark.parametrize("bound, why", [("_MOST_SAMPLES", "samples"), ("_MOST_BYTES", "bytes")])
@pytest.mark.parametrize("archived", [False, True])
def test_a_clip_has_a_largest_size(bound, why, archived, tmp_path, monkeypatch):
    folder = _speech(tmp_path, [("a.wav", "one", "train", _sound(0.1))], archived)
    monkeypatch.setattr(speech, bound, 100)
    with pytest.raises(UserError, match=rf"a.wav has [\d,]+ {why}, more than 100; split it"):
        _task("speech", folder).examples("train")


def test_a_stream_that_does_not_know_its_length_is_whole(tmp_path):
    whole = bytearray(_sound(0.2))
    whole[4:8] = b"\xff" * 4
    folder = _speech(tmp_path, [("a", "one", "train", bytes(whole))])
    assert len(_task("speech", folder).examples("train")[0].sound(8000)) == 1600


def test_what_decodes_at_its_end_but_not_before_is_one_line(tmp_path):
    whole = bytearray(_sound(2.0, 16000, "FLAC"))
    whole[len(whole) // 3:len(whole) // 3 + 2000] = bytes(2000)
    folder = _speech(tmp_path, [("a", "one", "train", bytes(whole))])
    with pytest.raises(UserError, match="a does not decode as audio"):
        _task("speech", folder).examples("train")[0].sound(16000)


def test_a_damaged_member_of_an_archive_is_named(tmp_path, caplog):
    folder = _speech(tmp_path, [("a.wav", "one", "train", _sound(0.1)), ("z.wav", "two", "train", _sound(0.2))], True)
    data = bytearray((folder / "clips.zip").read_bytes())
    data[data.rindex(b"data", 0, data.index(b"PK\x01\x02")) + 40] ^= 255
    (folder / "clips.zip").write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert len(_task("speech", folder, max_bad_share=0.5).examples("train")) == 1
    assert "z.wav does not decode as audio" in caplog.text


def test_splits_that_nobody_asks_for_are_counted(tmp_path, caplog):
    rows = [(f"{i}.wav", f"{i}", split, _sound(0.1)) for i, split in
            enumerate(("train", "test", "validation", "validation", "Train"))]
    folder = _speech(tmp_path, rows)
    (folder / "index.tsv").write_bytes(b"\xef\xbb\xbf" + (folder / "index.tsv").read_bytes())  # as some editors write
    with caplog.at_level(logging.WARNING):
        assert len(_task("speech", folder).examples("train")) == 1
    assert "left out: validation 2, Train 1" in caplog.text
    assert len(_task("speech", folder, train_split="train+validation+Train").examples("train")) == 4
    with pytest.raises(UserError, match=r"has no row of the test split; see task.test_split \(dev\)"):
        _task("speech", folder, test_split="dev").examples("test")


@pytest.mark.parametrize("where", ["folder", "zip", "zip with a folder"])
def test_common_voice_is_read_as_mozilla_packs_it(where, tmp_path):
    folder = tmp_path / "hi"
    (folder / "clips").mkdir(parents=True)
    for split in ("train", "dev", "test"):
        (folder / "clips" / f"{split}.mp3").write_bytes(_sound(0.3, 16000, "MP3"))
        (folder / f"{split}.tsv").write_text(f"client_id\tpath\tsentence\nx\t{split}.mp3\tThe {split}\n")
    if where != "folder":
        with zipfile.ZipFile(tmp_path / "hi.zip", "w") as archive:
            for file in folder.rglob("*.*"):
                archive.write(file, file.relative_to(folder if where == "zip" else tmp_path))
            archive.writestr("__MACOSX/._train.tsv", b"\x00\x05\x16")
        folder = tmp_path / "hi.zip"
    task = _task("speech", folder, train_split="train+dev")
    assert {e.answer for e in task.examples("train")} == {"the train", "the dev"}
    assert [len(e.sound(16000)) for e in task.examples("test")] == [4800]
    with pytest.raises(UserError, match=r"holds neither index.tsv nor validation.tsv; see task.train_split"):
        _task("speech", folder, train_split="validation").examples("train")


def test_an_archive_takes_the_place_of_a_folder(tmp_path):
    folder = _speech(tmp_path, [("a.wav", "one", "train", _sound(0.1)), ("b.wav", "two", "test", _sound(0.2))])
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for name in ("index.tsv", "a.wav", "b.wav"):
            archive.write(folder / name, name)
    assert len(_task("speech", tmp_path / "all.zip").examples("test")[0].sound(8000)) == 1600


@pytest.mark.parametrize("audio", [None, {"bytes": None, "path": None}, {"bytes": b"no", "path": "x.wav"}])
def test_bad_clips_of_the_hub_are_named(audio, monkeypatch, caplog):
    good = {"bytes": _sound(0.1), "path": "x.wav"}
    features = datasets.Features({"audio": datasets.Audio(16000), "sentence": datasets.Value("string")})
    rows = datasets.Dataset(pyarrow.table({"audio": [good, good, audio], "sentence": ["Eins", "Zwei", "Drei"]},
                                          features.arrow_schema))
    monkeypatch.setattr("datasets.load_dataset", lambda path, name=None, split=None: rows)
    with caplog.at_level(logging.WARNING):
        found = _task("speech", "who/what", max_bad_share=0.5).examples("train")
    assert {e.answer for e in found} == {"eins", "zwei"} and len(found[0].sound(16000)) == 1600
    assert "1 of 3 rows left out: who/what train 2" in caplog.text


def _tiny_whisper():
    config = ModelConfig(family="whisper", d_model=32, n_layers=1, window_seconds=0.4)
    processor = build_processor(config, tiny_tokenizer())
    return processor, build_model(config, processor).eval()


def test_a_sound_is_cut_where_it_is_quiet_and_leaves_no_crumb():
    processor, _ = _tiny_whisper()
    sound = np.sin(np.arange(13000, dtype=np.float32))
    sound[5900:6300] = 0  # in the last fifth of the first window of 6,400 samples
    pieces = [e.sound(16000) for e in windows(Example("", "", lambda rate: sound), processor)]
    assert np.array_equal(np.concatenate(pieces), sound) and 5900 < len(pieces[0]) < 6300
    for length in (6401, 6400 + 1599, 12800, 20000):
        sound = np.ones(length, np.float32)
        sizes = [len(e.sound(16000)) for e in windows(Example("", "", lambda rate, s=sound: s), processor)]
        assert sum(sizes) == length and max(sizes) <= 6400 and min(sizes) >= 1600, sizes


def test_only_long_sounds_have_no_cross_entropy():
    processor, model = _tiny_whisper()
    example = Example("", "one", lambda rate: np.ones(16000, np.float32))
    metrics = _task("dialtones").score(model, processor, [example], EvaluateConfig(max_new_tokens=3)).metrics
    assert metrics["cross_entropy"] is None and metrics["perplexity"] is None and metrics["wer"] >= 1


def test_what_a_decoder_starts_from_takes_positions():
    processor, _ = _tiny_whisper()
    example = Example("", "1", lambda rate: np.ones(1600, np.float32))
    task = _task("dialtones", max_length=2)  # the answer's token and the end
    assert task.fits(example, processor)
    several = type(processor)(processor.tokenizer, (0, 1, 2, 3), processor.features)
    assert not task.fits(example, several) and _task("dialtones", max_length=5).fits(example, several)


def test_decoded_sounds_are_cached_up_to_a_number_of_bytes(monkeypatch):
    decoded.clear()
    sound, too_large = (Sound(name, lambda: _sound(1)) for name in "ab")
    samples = sound(8000)
    assert sound(8000) is samples and decoded.currsize == samples.nbytes and len(sound(4000)) == 4000
    monkeypatch.setattr(decoded, "getsizeof", lambda samples: decoded.maxsize + 1)
    assert np.array_equal(too_large(8000), samples) and too_large(8000) is not too_large(8000)


def test_error_rates_with_and_without_normalisation():
    found = _task("dialtones").measure([{"answer": "Eins, zwei!", "prediction": "eins zwei"},
                                        {"answer": "drei", "prediction": "vier"}])
    assert found["wer"] == pytest.approx(1.0) and found["wer_normalised"] == pytest.approx(1 / 3)
    assert normalise("नमस्ते, दुनिया!") == "नमस्ते दुनिया"
    assert normalise("क्\u200dष श\u200c्र") == "क्ष श्र"


def test_dial_tones_are_seeded_and_as_long_as_they_say():
    task = _task("dialtones")
    first, again = task.examples("train")[3], task.examples("train")[3]
    assert np.array_equal(first.sound(16000), again.sound(16000)) and first.answer == again.answer
    assert max(len(task.examples("train")[i].sound(16000)) for i in range(100)) <= 16000
