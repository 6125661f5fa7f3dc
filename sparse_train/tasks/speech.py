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
        found = [sample["prediction"].strip() for sample in samples]
        wanted = [sample["answer"].strip() for sample in samples]
        plain_found, plain_wanted = [normalise(text) for text in found], [normalise(text) for text in wanted]
        return {"wer": jiwer.wer(wanted, found), "cer": jiwer.cer(wanted, found),
                "wer_normalised": jiwer.wer(plain_wanted, plain_found),
                "cer_normalised": jiwer.cer(plain_wanted, plain_found)}


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
            found = read.usable(read.placed(rows, config, name), lambda numbered: _hub_clip(rows, *numbered), config)
            return read.shuffled(found, lambda example: example.answer)
        clips = _Clips(self._path)
        found = read.usable(self._rows(clips.root, split, name), clips.example, config)
        return read.shuffled(found, lambda example: example.sound.name)

    def _rows(self, root: Path | zipfile.Path, split: str, name: str) -> Iterator[tuple[str, dict[str, str]]]:
        """(place, row) of the split."""
        if not (index := root / "index.tsv").is_file():
            files = read.split_files(root, name, "tsv")
            if not files:
                raise UserError(f"task.path={self.config.path} holds neither index.tsv nor {name}.tsv; see "
                                f"task.{split}_split")
            yield from itertools.chain.from_iterable(map(_table, files))
            return
        known = {part for both in ("train", "test") for part in self.config.split_name(both).split("+")}
        others: collections.Counter[str] = collections.Counter()
        for place, row in _table(index):
            given = row.get("split")
            if given and given not in known:
                others[given] += 1
            elif given in name.split("+") if given else (
                    read.in_test(row.get("file") or row.get("path", ""), self.config.test_share) == (split == "test")):
                yield place, row
        if others:
            log.warning("%s: rows of splits that neither task.train_split nor task.test_split names are left out: %s",
                        index, ", ".join(f"{other} {count}" for other, count in others.items()))


def _table(file: Path | zipfile.Path) -> Iterator[tuple[str, dict[str, str]]]:
    rows = read.rows(file)
    columns = next(rows, ("", ""))[1].split("\t")
    if not {"file", "text"} <= set(columns) and not {"path", "sentence"} <= set(columns):
        raise UserError(f"{file} lacks a column; its first line must name file and text, or path and sentence")
    return ((place, dict(zip(columns, line.split("\t"), strict=False))) for place, line in rows)


class Sound:
    """Encoded audio that is decoded when asked, to mono at a sampling rate."""

    def __init__(self, name: str, encoded: Callable[[], bytes]):
        self.name, self._encoded = name, encoded
        try:
            data = encoded()
            with soundfile.SoundFile(io.BytesIO(data)) as opened:
                num_samples = opened.frames
                if num_samples * opened.channels > _MOST_SAMPLES:
                    raise read.Unusable(f"{name} has {num_samples:,} samples, more than {_MOST_SAMPLES:,}; split it")
                is_finite = opened.subtype not in _FLOATS or all(
                    (np.abs(block) <= _LOUDEST).all() for block in opened.blocks(2**16, dtype="float32"))
                opened.seek(max(0, num_samples - 1))
                is_whole = len(opened.read(1)) == 1 and not _is_cut(data)
        except (soundfile.SoundFileError, *read.DAMAGED) as error:
            raise read.Unusable(f"{name} does not decode as audio") from error
        if not is_finite:
            raise read.Unusable(f"{name} has samples that are not finite, or far beyond any full scale")
        if not num_samples:
            raise read.Unusable(f"{name} has no sound in it")
        if not is_whole:
            raise read.Unusable(f"{name} is shorter than it declares")

    def __call__(self, sampling_rate: int) -> np.ndarray:
        """(samples,) float32. Raises UserError where it does not decode."""
        held = _decoded.get((self, sampling_rate))
        if held is None:
            try:
                samples, rate = soundfile.read(io.BytesIO(self._encoded()), dtype="float32", always_2d=True)
            except (soundfile.SoundFileError, *read.DAMAGED) as error:
                raise UserError(f"{self.name} does not decode as audio: {error}; repair it or take it out") from error
            held = soxr.resample(samples.mean(1), rate, sampling_rate).astype(np.float32)
            _decoded.put((self, sampling_rate), held)
        return held


class Decoded:
    """The sounds asked for last, as many as `most_bytes` hold."""

    def __init__(self, most_bytes: int):
        self._most_bytes, self.num_bytes = most_bytes, 0
        self._held: collections.OrderedDict[Any, np.ndarray] = collections.OrderedDict()

    def get(self, key: Any) -> np.ndarray | None:
        if key in self._held:
            self._held.move_to_end(key)
        return self._held.get(key)

    def put(self, key: Any, samples: np.ndarray) -> None:
        self._held[key] = samples
        self.num_bytes += samples.nbytes
        while self.num_bytes > self._most_bytes:
            self.num_bytes -= self._held.popitem(last=False)[1].nbytes


_decoded = Decoded(512 * 2**20)  # per process: two hours at 16 kHz, so that a small data set stays decoded


def _is_cut(data: bytes) -> bool:
    """WAV and AIFF say how long they are; libsndfile reads what is there and says nothing."""
    order = {b"RIFF": "little", b"FORM": "big"}.get(data[:4])
    declared = int.from_bytes(data[4:8], order) if order else 0
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

    def example(self, row: dict[str, str]) -> Example:
        if "sentence" in row:
            return Example("", read.text_of(row, "sentence").lower(), self._sound(f"clips/{read.text_of(row, 'path')}"))
        return Example("", read.text_of(row, "text"), self._sound(read.text_of(row, "file")))

    def _sound(self, name: str) -> Sound:
        if archive := self._archives.get(name):
            _check_size(name, archive.getinfo(name).file_size)
            return Sound(name, functools.partial(archive.read, name))
        file = self.root / name
        outside = isinstance(file, Path) and not file.resolve().is_relative_to(self.root.resolve())
        if outside or not file.is_file():
            raise read.Unusable(f"there is no {name}")
        _check_size(name, self.root.root.getinfo(file.at).file_size if isinstance(file, zipfile.Path)
                    else file.stat().st_size)
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
