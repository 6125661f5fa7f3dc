"""English number words to German: an endless translation task that needs no data. 0 to 999,999, by num2words."""

import random
from collections.abc import Sequence

from num2words import num2words

from sparse_train.tasks.batch import Example
from sparse_train.tasks.generated import Generated
from sparse_train.tasks.translation import Translating


class Numbers(Translating):
    endless = True

    def read(self, split: str) -> Sequence[Example]:
        def draw(random_: random.Random) -> tuple[str, Example]:
            number = random_.randrange(10 ** random_.randint(1, 6))
            return str(number), self.pair(num2words(number, lang="en"), num2words(number, lang="de"), split)

        return Generated("sparse-train numbers 1", split, draw)
