"""All rules by name: those of the core, of the Python layers, and of the protocols."""

from __future__ import annotations

from difflib import get_close_matches
from itertools import chain
from types import MappingProxyType
from typing import Final

from virtio_test.errors import InvalidArgument

from .entry import Entry
from .functions import CLASS_ENTRIES, PCI_ENTRIES
from .messages import MESSAGE_ENTRIES
from .registers import REGISTER_ENTRIES
from .rings import RING_ENTRIES
from .suppression import SUPPRESSION_ENTRIES

__all__ = ["CATALOGUE", "entries", "nearest"]


def _by_name() -> dict[str, tuple[Entry, ...]]:
    found: dict[str, tuple[Entry, ...]] = {}
    tables = (RING_ENTRIES, SUPPRESSION_ENTRIES, REGISTER_ENTRIES, PCI_ENTRIES, CLASS_ENTRIES, MESSAGE_ENTRIES)
    for entry in chain.from_iterable(tables):
        found[entry.name] = (*found.get(entry.name, ()), entry)
    return found


CATALOGUE: Final = MappingProxyType(_by_name())
"""Name to its entries: several where two protocols use one name."""


def nearest(name: str, count: int = 3) -> list[str]:
    """Names that look most like `name`, the best one first."""
    folded = {each.casefold(): each for each in CATALOGUE}
    found = get_close_matches(name.casefold(), folded, n=count, cutoff=0.4)
    found += [each for each in folded if name and name.casefold() in each and each not in found]
    return [folded[each] for each in found[:count]]


def entries(name: str) -> tuple[Entry, ...]:
    """The entries of a rule, in no matter which case.

    Raises:
        InvalidArgument: there is no such rule; the message says which names look like it.
    """
    known = {each.casefold(): each for each in CATALOGUE}.get(name.casefold())
    if known is None:
        near = nearest(name)
        hint = f"the nearest names are {', '.join(near)}" if near else "`virtio-test explain --list` shows all"
        raise InvalidArgument(f"no rule is called {name!r}; {hint}")
    return CATALOGUE[known]
