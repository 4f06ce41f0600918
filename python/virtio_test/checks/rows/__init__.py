"""The robustness catalogue as data: what the other side may do, row by row, and what comes of it under either policy.

A rule says what can be raised; a row says what happens. Some rows are answered by a rule, others by behaviour: what
is accepted, not looked at, dropped or completed with nothing. Ids are stable. Those of a letter and a number are of
the catalogue's sections; others are vulnerabilities, and issues or commits of other projects.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from itertools import chain
from types import MappingProxyType
from typing import Final

from virtio_test.checks.catalogue import CATALOGUE
from virtio_test.errors import InvalidArgument

from .buffers import BUFFER_ROWS, TABLE_ROWS
from .completion import NOTIFY_ROWS, RACE_ROWS, USED_ROWS
from .driver import DRIVER_ROWS
from .elsewhere import DPDK_ROWS, LINUX_ROWS, VMM_ROWS
from .messages import MESSAGE_ROWS
from .packed import PACKED_ROWS
from .pci import PCI_ROWS
from .qemu import QEMU_ROWS
from .registers import QUEUE_ROWS, STATUS_ROWS
from .rings import CHAIN_ROWS, HEAD_ROWS
from .row import Meets, Row
from .state import STATE_ROWS

__all__ = ["ROWS", "SECTIONS", "Meets", "Row", "find_row", "rows_of_rule", "rules_of_row"]

SECTIONS: Final[Mapping[str, tuple[Row, ...]]] = MappingProxyType(
    {
        "Avail ring and heads (split)": HEAD_ROWS,
        "Walking a chain (split)": CHAIN_ROWS,
        "Buffers": BUFFER_ROWS,
        "Indirect tables": TABLE_ROWS,
        "Packed ring": PACKED_ROWS,
        "Queue configuration": QUEUE_ROWS,
        "Status, features, reset": STATUS_ROWS,
        "PCI": PCI_ROWS,
        "Completion": USED_ROWS,
        "Notifications": NOTIFY_ROWS,
        "What changes meanwhile": RACE_ROWS,
        "Saved state and what is in flight": STATE_ROWS,
        "vhost-user messages": MESSAGE_ROWS,
        "Our driver before a hostile device": DRIVER_ROWS,
        "What went wrong in QEMU": QEMU_ROWS,
        "What went wrong in Linux": LINUX_ROWS,
        "What went wrong in DPDK": DPDK_ROWS,
        "What went wrong in other monitors and libraries": VMM_ROWS,
    }
)
"""All rows, in the order of the catalogue."""

ROWS: Final = MappingProxyType({row.id: row for row in chain.from_iterable(SECTIONS.values())})
"""Id to row; `find_row` knows the other ids too."""

_BY_ID: Final = {name.casefold(): row for row in ROWS.values() for name in row.ids}


def find_row(name: str) -> Row:
    """The row of an id, in no matter which case.

    Raises:
        InvalidArgument: there is none; the message says which ids look like it.
    """
    found = _BY_ID.get(name.casefold())
    if found is None:
        near = [_BY_ID[each].id for each in get_close_matches(name.casefold(), _BY_ID, cutoff=0.4)]
        hint = f"the nearest are {', '.join(dict.fromkeys(near))}" if near else "`explain --list --rows` shows all"
        raise InvalidArgument(f"no row is called {name!r}; {hint}")
    return found


def rows_of_rule(name: str) -> tuple[str, ...]:
    """Ids of the rows that a rule answers: those that it names, and those that name it."""
    told = [row for entry in CATALOGUE.get(name, ()) for row in entry.rows]
    return tuple(dict.fromkeys((*told, *(row.id for row in ROWS.values() if name in row.rules))))


def rules_of_row(row: Row) -> tuple[str, ...]:
    """Names of the rules that answer a row: those that it names, and those that name it."""
    naming = (name for name, found in CATALOGUE.items() if any(row.id in entry.rows for entry in found))
    return tuple(dict.fromkeys((*row.rules, *naming)))
