"""Keypad tones with noise to digits: an endless speech task that needs no data.

Each key is the sum of a low and a high tone (ITU-T Q.23), 60 to 100 ms long with pauses of 20 to 50 ms, under white
noise.
"""

import random
from collections.abc import Sequence

import numpy as np

from sparse_train.tasks.batch import Example
from sparse_train.tasks.generated import Generated
from sparse_train.tasks.speech import Transcribing

_LOW, _HIGH = (697, 770, 852, 941), (1209, 1336, 1477)
_KEYS = "123456789*0#"


class DialTones(Transcribing):
    endless = True

    def read(self, split: str) -> Sequence[Example]:
        return Generated("sparse-train dialtones 1", split, _draw)


def _draw(random_: random.Random) -> tuple[str, Example]:
    keys = [random_.choice("0123456789") for _ in range(random_.randint(2, 5))]
    text = " ".join(keys)
    return text, Example("", text, _Tones(keys, random_.getrandbits(32)))


class _Tones:
    def __init__(self, keys: Sequence[str], seed: int):
        self._keys, self._seed = keys, seed

    def __call__(self, sampling_rate: int) -> np.ndarray:
        draw, parts = np.random.default_rng(self._seed), []
        for key in self._keys:
            row, column = divmod(_KEYS.index(key), 3)
            time = np.arange(int(sampling_rate * draw.uniform(0.06, 0.1))) / sampling_rate
            parts += [sum(np.sin(2 * np.pi * pitch * time) for pitch in (_LOW[row], _HIGH[column])) / 2,
                      np.zeros(int(sampling_rate * draw.uniform(0.02, 0.05)))]
        sound = np.concatenate(parts)
        return (sound + draw.normal(0, 0.2, len(sound))).astype(np.float32)
