"""Speech recognition, scored by word and character error rate.

task.path is one of: a hub data set with `audio` and `sentence` columns (Common Voice); a folder with index.tsv (columns
file, text and, where there is one, split) and the clips beside it or in .zip files beside it.
"""

import functools
import io
import re
import unicodedata
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
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


class Transcribing(Task):
    metric = "wer"
    best = min

    def measure(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """wer and cer as they stand; wer_normalised and cer_normalised without case, punctuation and marks of form."""
        found = [sample["prediction"].strip() for sample in samples]
        wanted = [sample["answer"].strip() for sample in samples]
        plain_found, plain_wanted = [normalise(text) for text in found], [normalise(text) for text in wanted]
        return {"wer": jiwer.wer(wanted, found), "cer": jiwer.cer(wanted, found),
                "wer_normalised": jiwer.wer(plain_wanted, plain_found),
                "cer_normalised": jiwer.cer(plain_wanted, plain_found)}


def normalise(text: str) -> str:
    """Lower case; symbols and punctuation become spaces; letters keep their marks, which Hindi's vowels are."""
    kept = "".join(" " if unicodedata.category(c)[0] in "PSZC" else c for c in unicodedata.normalize("NFKC", text))
    return re.sub(r"\s+", " ", kept.lower()).strip() or "-"


class Speech(Transcribing):
    def __init__(self, config: TaskConfig):
        super().__init__(config)
        path = read.local(config, "a folder with index.tsv and audio")
        if path is None:
            self._splits = {split: read.usable(read.hub_rows(config, split, undecoded="audio"), _hub_clip, config)
                            for split in ("train", "test")}
        else:
            self._splits = self._read(path)

    def examples(self, split: str, num_examples: int | None = None) -> Sequence[Example]:
        return self._splits[split][:num_examples]

    def _read(self, folder: Path) -> dict[str, list[Example]]:
        rows = read.lines(folder / "index.tsv")
        columns = next(rows, ("", ""))[1].split("\t")
        for column in ("file", "text"):
            if column not in columns:
                raise UserError(f"{folder / 'index.tsv'} has no column {column!r}; its first line must name file and "
                                "text")
        clips = _Clips(folder)

        def make(line: str) -> tuple[str, Example]:
            row = dict(zip(columns, line.split("\t"), strict=False))
            name, text = read.text_of(row, "file"), read.text_of(row, "text")
            split = row.get("split") or ("test" if read.in_test(name, self.config.test_share) else "train")
            sound = clips.sound(name)
            return split, Example("", text, sound)

        found = read.shuffled(read.usable(rows, make, self.config), lambda pair: pair[1].sound.name)
        return {split: [example for which, example in found if which == split] for split in ("train", "test")}


class Sound:
    """Encoded audio that is decoded when asked, to mono at a sampling rate."""

    def __init__(self, name: str, encoded: Callable[[], bytes]):
        self.name, self._encoded = name, encoded
        try:
            self.seconds = soundfile.info(io.BytesIO(encoded())).duration
        except (soundfile.SoundFileError, OSError, KeyError) as error:
            raise read.Unusable(f"{name} does not decode as audio") from error
        if not self.seconds:
            raise read.Unusable(f"{name} has no sound in it")

    def __call__(self, sampling_rate: int) -> np.ndarray:
        """(samples,) float32."""
        return _decode(self._encoded, sampling_rate)


@functools.lru_cache(maxsize=20_000)  # clips of seconds: a small data set stays decoded
def _decode(encoded: Callable[[], bytes], sampling_rate: int) -> np.ndarray:
    samples, rate = soundfile.read(io.BytesIO(encoded()), dtype="float32", always_2d=True)
    return soxr.resample(samples.mean(1), rate, sampling_rate).astype(np.float32)


class _Clips:
    """Files of a folder and of the archives in it."""

    def __init__(self, folder: Path):
        self._folder, self._archives = folder, {}
        for file in sorted(folder.glob("*.zip")):
            try:
                archive = zipfile.ZipFile(file)
            except (OSError, zipfile.BadZipFile) as error:
                raise UserError(f"cannot read {file}: {error}") from error
            self._archives |= dict.fromkeys(archive.namelist(), archive)

    def sound(self, name: str) -> Sound:
        file = (self._folder / name).resolve()
        if name in self._archives:
            return Sound(name, functools.partial(self._archives[name].read, name))
        if not file.is_relative_to(self._folder.resolve()) or not file.is_file():
            raise read.Unusable(f"there is no {name}")
        return Sound(name, file.read_bytes)


def _hub_clip(row: dict) -> Example:
    audio = row["audio"]
    encoded = audio.get("bytes")
    name = str(audio.get("path"))
    return Example("", read.text_of(row, "sentence").lower(),
                   Sound(name, (lambda: encoded) if encoded else Path(name).read_bytes))
