"""The catalogue's rows as cases: all of one row in turn, or any at random."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from random import Random
from typing import Final

from virtio_test.errors import InvalidArgument

from .case import RingCase
from .draw import RandomDraw, every
from .mutators import MUTATORS, Mutator

__all__ = ["ROWS", "cases", "mutators", "random_case"]

ROWS: Final[tuple[str, ...]] = tuple(sorted(MUTATORS))
"""Every row that has a mutator."""


def mutators(rows: str | Iterable[str] | None = None) -> tuple[Mutator, ...]:
    """Those of the rows, which are all when None; `InvalidArgument` for a row that has none."""
    wanted = ROWS if rows is None else (rows,) if isinstance(rows, str) else tuple(rows)
    unknown = [each for each in wanted if each not in MUTATORS]
    if unknown:
        raise InvalidArgument(f"no mutator for {', '.join(unknown)}; rows are {', '.join(ROWS)}")
    return tuple(mutator for each in wanted for mutator in MUTATORS[each])


def cases(rows: str | Iterable[str] | None = None) -> Iterator[RingCase]:
    """Every boundary case of the rows in a plain scene, always the same, in a stable order."""
    for mutator in mutators(rows):
        yield from every(mutator)


_EVERY: Final = mutators()


def random_case(random: Random, rows: str | Iterable[str] | None = None) -> RingCase:
    """Any case of the rows in any scene."""
    draw = RandomDraw(random)
    return draw.choice(_EVERY if rows is None else mutators(rows))(draw)
