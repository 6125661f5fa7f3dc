"""Generated word problems in GSM8K's format: worked steps with <<a*b=c>> marks, the number after ####.

Endless and seeded: problem i of a split is a function of (split, i) alone. A problem belongs to the split that its text
hashes to, so no test problem is ever a training problem.
"""

import random
from collections.abc import Sequence

from sparse_train.tasks.batch import Example
from sparse_train.tasks.generated import Generated
from sparse_train.tasks.gsm8k import WordProblems

_NAMES = ("Tom", "Ann", "Ben", "Eva", "Max", "Lea", "Sam", "Mia")
_THINGS = ("apples", "books", "coins", "cards", "pens", "eggs", "shells", "stamps")
_LARGEST_FACTOR = 9
_LARGEST_TERM = 30


class Arithmetic(WordProblems):
    endless = True

    def read(self, split: str) -> Sequence[Example]:
        def draw(random_: random.Random) -> tuple[str, Example]:
            question, answer = _problem(random_)
            return f"Question: {question}\nAnswer:", self.problem(question, answer, split)

        return Generated("sparse-train arithmetic 1", split, draw)


def _problem(draw: random.Random) -> tuple[str, str]:
    """Two steps on small numbers; every result is in 1..99."""
    name, thing = draw.choice(_NAMES), draw.choice(_THINGS)
    return draw.choice((_boxes, _share, _chain))(draw, name, thing)


def _boxes(draw, name, thing):
    count, each = draw.randint(2, _LARGEST_FACTOR), draw.randint(2, _LARGEST_FACTOR)
    total = count * each
    lost = draw.randint(1, min(total - 1, _LARGEST_TERM))
    return (
        f"{name} has {count} boxes of {each} {thing} and loses {lost}. How many {thing} are left?",
        _steps((f"{count}*{each}", total), (f"{total}-{lost}", total - lost)))


def _share(draw, name, thing):
    people, each = draw.randint(2, _LARGEST_FACTOR), draw.randint(2, _LARGEST_FACTOR)
    total = people * each
    have = draw.randint(1, total - 1)
    more = total - have
    return (
        f"{name} has {have} {thing} and finds {more}. {name} shares all with {people} friends. How many each?",
        _steps((f"{have}+{more}", total), (f"{total}/{people}", each)))


def _chain(draw, name, thing):
    first, second = draw.randint(2, _LARGEST_TERM), draw.randint(2, _LARGEST_TERM)
    together = first + second
    lost = draw.randint(1, min(together - 1, _LARGEST_TERM))
    return (
        f"{name} has {first} {thing} and buys {second}, then gives away {lost}. How many {thing} are left?",
        _steps((f"{first}+{second}", together), (f"{together}-{lost}", together - lost)))


def _steps(*steps: tuple[str, int]) -> str:
    lines = [f"{text}=<<{text}={result}>>{result}" for text, result in steps]
    return "\n".join([*lines, f"#### {steps[-1][1]}"])
