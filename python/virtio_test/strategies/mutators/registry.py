"""The mutators by row: each turns a legal ring into exactly one violation, and says what must come of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from virtio_test.strategies.case import RingCase
from virtio_test.strategies.draw import Draw

__all__ = ["MUTATORS", "Mutator", "row"]

Mutator = Callable[[Draw], RingCase]

MUTATORS: Final[dict[str, list[Mutator]]] = {}
"""Row to its mutators, filled by the modules beside this one."""


def row(name: str) -> Callable[[Mutator], Mutator]:
    """Register a mutator of that row; the cases that it makes carry the name."""

    def register(mutator: Mutator) -> Mutator:
        def named(draw: Draw) -> RingCase:
            case = mutator(draw)
            # Nobody else has it yet, and to make it twice is a fifth of all that a case costs.
            object.__setattr__(case, "row", name)
            return case

        MUTATORS.setdefault(name, []).append(named)
        return mutator

    return register
