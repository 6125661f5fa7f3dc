"""Speech recognition, scored by word and character error rate.

task.path is one of: a folder with index.tsv (columns file, text and, where there is one, split) and the clips beside it
or in .zip files beside it; Common Voice as Mozilla packs it ({train,dev,test,validated}.tsv with columns path and
sentence, clips/); a .zip of either; a hub data set with `audio` and `sentence` columns. Sentences, which are Common
Voice's, are lower-cased, as in the paper.

A clip is checked when it is listed: its header, that its end decodes, and that no byte which it declares is missing.
"""

import collections
import functools
import io
import itertools
import logging
import re
import unicodedata
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

import cachetools
import jiwer
import numpy as np
import soundfile
import soxr

from sparse_train.config import TaskConfig
from sparse_train.errors import UserError
from sparse_train.tasks import read
from sparse_train.tasks.batch import Example
from sparse_train.tasks.task import Task

log = logging.getLogger(__name__)
_FLOATS = ("FLOAT", "DOUBLE")  # what can spell NaN and Inf
# Per process: two hours at 16 kHz, so that a small data set stays decoded.
decoded: cachetools.LRUCache[tuple["Sound", int], np.ndarray] = cachetools.LRUCache(
    512 * 2**20, getsizeof=lambda samples: samples.nbytes)
_LOUDEST = 2.0**31  # full scale is 1, or that of some integers; squares of much more leave float32
_MOST_SAMPLES = 2**28  # over four hours at 16 kHz
_MOST_BYTES = 2**30  # of an encoded clip


class Transcribing(Task):
    takes_audio = True
    metric = "wer"
    extra_metrics = ("wer_normalised", "cer", "cer_normalised")
    higher_is_better = False

    def measure(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """wer and cer as they stand; wer_normalised and cer_normalised without case, punctuation and marks of form."""
        answers = [sample["answer"].strip() for sample in samples]
        predictions = [sample["prediction"].strip() for sample in samples]
        plain_answers, plain_predictions = list(map(normalise, answers)), list(map(normalise, predictions))
        return {"wer": jiwer.wer(answers, predictions), "cer": jiwer.cer(answers, predictions),
                "wer_normalised": jiwer.wer(plain_answers, plain_predictions),
                "cer_normalised": jiwer.cer(plain_answers, plain_predictions)}


def normalise(text: str) -> str:
    """Lower case; symbols and punctuation become spaces; letters keep their marks, which Hindi's vowels are.

    Characters that only shape their neighbours, such as the zero-width joiner, leave nothing behind.
    """
    shown = (c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) != "Cf")
    kept = "".join(" " if unicodedata.category(c)[0] in "PSZC" else c for c in shown)
    return re.sub(r"\s+", " ", kept.lower()).strip() or "-"


class Speech(Transcribing):
    def __init__(self, config: TaskConfig):
        super().__init__(config)
        self._path = read.local(config, "a folder or .zip with index.tsv and audio, or Common Voice's")

    def read(self, split: str) -> Sequence[Example]:
        config, name = self.config, self.config.split_name(split)
        if self._path is None:
            rows = read.hub_rows(config, name, undecoded="audio")
            places = read.numbered(rows, config, name)
            examples = read.usable(places, lambda numbered: _hub_clip(rows, *numbered), config)
            return read.shuffled(examples, lambda example: example.answer)
        clips = _Clips(self._path)
        named = read.usable(self._rows(clips.root, split, name), clips.named_example, config)
        return [example for _, example in read.shuffled(named, lambda pair: pair[0])]

    def _rows(self, root: Path | zipfile.Path, split: str, name: str) -> Iterator[tuple[str, dict[str, str]]]:
        """(place, row) of the split."""
        if not (index := root / "index.tsv").is_file():
            files = read.split_files(root, name, "tsv")
            if not files:
                key = self.config.key
                raise UserError(f"{key}.path={self.config.path} holds neither index.tsv nor {name}.tsv; see "
                                f"{key}.{split}_split")
            yield from itertools.chain.from_iterable(map(_table, files))
            return
        known = {part for both in ("train", "test") for part in self.config.split_name(both).split("+")}
        others: collections.Counter[str] = collections.Counter()
        for place, row in _table(index):
            row_split = row.get("split")
            if not row_split:
                is_test = read.in_test(row.get("file") or row.get("path", ""), self.config.test_share)
                if is_test == (split == "test"):
                    yield place, row
            elif row_split in name.split("+"):
                yield place, row
            elif row_split not in known:
                others[row_split] += 1
        if others:
            key = self.config.key
            log.warning("%s: rows of splits that neither %s.train_split nor %s.test_split names are left out: %s",
                        index, key, key, ", ".join(f"{other} {count}" for other, count in others.items()))


def _table(file: Path | zipfile.Path) -> Iterator[tuple[str, dict[str, str]]]:
    rows = read.rows(file)
    columns = next(rows, ("", ""))[1].split("\t")
    if not {"file", "text"} <= set(columns) and not {"path", "sentence"} <= set(columns):
        raise UserError(f"{file} lacks a column; its first line must name file and text, or path and sentence")
    return ((place, dict(zip(columns, line.split("\t"), strict=False))) for place, line in rows)


class Sound:
    """Encoded audio that is decoded on demand, to mono at a sampling rate. Raises read.Unusable where it is damaged."""

    def __init__(self, name: str, encoded: Callable[[], bytes]):
        self.name, self._encoded = name, encoded
        try:
            data = encoded()
            with soundfile.SoundFile(io.BytesIO(data)) as file:
                num_samples = file.frames
                if num_samples * file.channels > _MOST_SAMPLES:
                    raise read.Unusable(f"{name} has {num_samples:,} samples, more than {_MOST_SAMPLES:,}; split it")
                is_finite = file.subtype not in _FLOATS or all(
                    (np.abs(block) <= _LOUDEST).all() for block in file.blocks(2**16, dtype="float32"))
                file.seek(max(0, num_samples - 1))
                is_whole = len(file.read(1)) == 1 and not _is_cut(data)
        except (soundfile.SoundFileError, *read.DAMAGED) as error:
            raise read.Unusable(f"{name} does not decode as audio") from error
        if not is_finite:
            raise read.Unusable(f"{name} has samples that are not finite, or far beyond any full scale")
        if not num_samples:
            raise read.Unusable(f"{name} has no sound in it")
        if not is_whole:
            raise read.Unusable(f"{name} is shorter than it declares")

    @cachetools.cached(decoded)
    def __call__(self, sampling_rate: int) -> np.ndarray:
        """(samples,) float32. Raises UserError where it does not decode."""
        try:
            samples, rate = soundfile.read(io.BytesIO(self._encoded()), dtype="float32", always_2d=True)
        except (soundfile.SoundFileError, *read.DAMAGED) as error:
            raise UserError(f"{self.name} does not decode as audio: {error}; repair it or take it out") from error
        return soxr.resample(samples.mean(1), rate, sampling_rate).astype(np.float32)


def _is_cut(data: bytes) -> bool:
    """WAV and AIFF declare their length, and libsndfile reads a shorter file without an error."""
    if data[:4] not in (b"RIFF", b"FORM"):
        return False
    declared = int.from_bytes(data[4:8], "little" if data[:4] == b"RIFF" else "big")
    # One byte less is a missing pad; all ones are written by a stream that does not know yet.
    return len(data) + 1 < declared + 8 and declared != 0xFFFFFFFF


class _Clips:
    """Files of a folder and of the archives in it, or of one archive."""

    def __init__(self, path: Path):
        self._archives: dict[str, zipfile.ZipFile] = {}
        self.root: Path | zipfile.Path = path
        if not path.is_dir():
            self.root = _top(zipfile.Path(_opened(path)))
            return
        for file in sorted(path.glob("[!.]*.zip")):
            archive = _opened(file)
            self._archives |= dict.fromkeys(archive.namelist(), archive)

    def named_example(self, row: dict[str, str]) -> tuple[str, Example]:
        """(the clip's name, the example)."""
        if "sentence" in row:
            text, name = read.text_of(row, "sentence").lower(), f"clips/{read.text_of(row, 'path')}"
        else:
            text, name = read.text_of(row, "text"), read.text_of(row, "file")
        return name, Example("", text, self._sound(name))

    def _sound(self, name: str) -> Sound:
        if archive := self._archives.get(name):
            _check_size(name, archive.getinfo(name).file_size)
            return Sound(name, functools.partial(archive.read, name))
        file = self.root / name
        is_outside = (isinstance(file, Path) and isinstance(self.root, Path)
                      and not file.resolve().is_relative_to(self.root.resolve()))
        if is_outside or not file.is_file():
            raise read.Unusable(f"there is no {name}")
        _check_size(name, read.unpacked_size(file))
        return Sound(name, file.read_bytes)


def _check_size(name: str, num_bytes: int) -> None:
    """Before it is unpacked: an archive's directory says how large a clip is, and zipfile unpacks no more."""
    if num_bytes > _MOST_BYTES:
        raise read.Unusable(f"{name} has {num_bytes:,} bytes, more than {_MOST_BYTES:,}; split it")


def _opened(file: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(file)
    except read.DAMAGED as error:
        raise UserError(f"cannot read {file}: {error}") from error


def _top(folder: zipfile.Path) -> zipfile.Path:
    """Past the one folder that an archive may have around everything."""
    inside = [path for path in folder.iterdir() if not read.is_litter(PurePath(path.name))]
    return _top(inside[0]) if len(inside) == 1 and inside[0].is_dir() else folder


def _hub_clip(rows: Sequence[dict], index: int, row: dict) -> Example:
    audio = row.get("audio")
    if not isinstance(audio, dict) or not (audio.get("bytes") or audio.get("path")):
        raise read.Unusable("no sound in column 'audio'")

    def encoded() -> bytes:
        audio = rows[index]["audio"]  # stays on disk
        return audio.get("bytes") or Path(audio["path"]).read_bytes()

    return Example("", read.text_of(row, "sentence").lower(), Sound(str(audio.get("path") or f"clip {index}"), encoded))
