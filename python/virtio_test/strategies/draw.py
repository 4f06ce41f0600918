"""Where a generator's decisions come from: Hypothesis, a plain random generator, or all of them in turn.

A generator takes a `Draw` and nothing else, so the same cases come out of all three. Two kinds of decisions are told
apart. `choice` and `integer` make the case what it is; `some` and `vary` set the scene. `every` enumerates the first
kind (of a range its two ends) and keeps the scene as plain as it can be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any, Protocol, TypeVar

__all__ = ["Draw", "RandomDraw", "every"]

T = TypeVar("T")


class Draw(Protocol):
    """A source of decisions; ranges include both ends."""

    def choice(self, options: Sequence[T], /) -> T:
        """One of them; a decision that matters."""
        ...

    def integer(self, low: int, high: int, /) -> int:
        """A number; a decision that matters."""
        ...

    def some(self, options: Sequence[T], /) -> T:
        """One of them; the first is the plain one."""
        ...

    def vary(self, low: int, high: int, usual: int, /) -> int:
        """A number; `usual` is the plain one."""
        ...


class RandomDraw:
    """Decisions of a `random.Random`."""

    __slots__ = ("_random",)

    def __init__(self, random: Random) -> None:
        self._random = random.random

    def choice(self, options: Sequence[T], /) -> T:
        """As `Draw` says."""
        return options[int(self._random() * len(options))]

    def integer(self, low: int, high: int, /) -> int:
        """As `Draw` says."""
        return low + int(self._random() * (high - low + 1))

    def some(self, options: Sequence[T], /) -> T:
        """As `Draw` says."""
        return options[int(self._random() * len(options))]

    def vary(self, low: int, high: int, _usual: int, /) -> int:
        """As `Draw` says."""
        return low + int(self._random() * (high - low + 1))


class _Path:
    """Takes a given way through the decisions, and notes how many options each had."""

    def __init__(self, way: Sequence[int]) -> None:
        self.taken: list[int] = []
        self.sizes: list[int] = []
        self._way = way

    def choice(self, options: Sequence[T], /) -> T:
        here = len(self.taken)
        index = self._way[here] if here < len(self._way) else 0
        self.taken.append(index)
        self.sizes.append(len(options))
        return options[index]

    def integer(self, low: int, high: int, /) -> int:
        return self.choice((low, high) if low < high else (low,))

    def some(self, options: Sequence[T], /) -> T:
        return options[0]

    def vary(self, _low: int, _high: int, usual: int, /) -> int:
        return usual


def every(generator: Callable[[Draw], Any]) -> Iterator[Any]:
    """What the generator makes of every way through its decisions, in a stable order."""
    way: list[int] = []
    while True:
        path = _Path(way)
        yield generator(path)
        way, sizes = path.taken, path.sizes
        while way and way[-1] + 1 == sizes[len(way) - 1]:
            way.pop()
        if not way:
            return
        way[-1] += 1
