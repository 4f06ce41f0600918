"""What stands in the fields that ask for fewer notifications.

A running queue never raises for them: a value that makes no sense costs notifications and nothing else. An image of a
ring shows them all the same, and with a strict policy `check_ring` tells.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from virtio_test._core import GuestMemory, QueueConfig
from virtio_test.errors import QueueViolation

from .entry import Entry, Outcome
from .view import field

__all__ = ["SUPPRESSION_ENTRIES", "check_suppression"]

_EVENT_IDX: Final = 1 << 29
_DESC: Final = 2
_PEER: Final = "a running queue, like all others, takes bit 0, or asks for one notification too many"


def _entry(name: str, clause: str, rows: str, summary: str) -> Entry:
    return Entry(
        name=name,
        family="virtio",
        clauses=(clause,),
        summary=summary,
        interop=Outcome.ACCEPTED,
        strict=Outcome.SHOWN,
        peer=_PEER,
        rows=tuple(rows.split()),
    )


SUPPRESSION_ENTRIES: Final = (
    _entry("AvailFlagsUndefined", "2.7.7.1", "A08 N05", "avail.flags is 0 or 1, and 0 with EVENT_IDX."),
    _entry("UsedFlagsUndefined", "2.7.10.2", "A15", "used.flags is 0 or 1, and 0 with EVENT_IDX."),
    _entry("EventFlagsUndefined", "2.8.10", "P22", "Event flags are 0 or 1, or 2 with EVENT_IDX."),
    _entry("EventBeyondRing", "2.8.14", "P23", "The place of an event is one of the ring."),
)
"""The rules that only a ring at rest is held to."""

_CLAUSES: Final = {entry.name: entry.clauses[0] for entry in SUPPRESSION_ENTRIES}


def check_suppression(memory: GuestMemory, config: QueueConfig) -> list[QueueViolation]:
    """What is broken in both areas.

    Whoever ignores reserved flags in a table (`packed_table_flags` of the policy) ignores them here.
    """
    if config.policy.switches()["packed_table_flags"]:
        return []
    return [*(_packed if config.packed else _split)(memory, config)]


def _split(memory: GuestMemory, config: QueueConfig) -> Iterator[QueueViolation]:
    layout, most = config.layout(), 0 if config.features & _EVENT_IDX else 1
    for name, rule in (("avail.flags", "AvailFlagsUndefined"), ("used.flags", "UsedFlagsUndefined")):
        if (flags := field(memory, layout, name)) > most:
            wanted = "0 or 1" if most else "0 with EVENT_IDX"
            yield _violation(rule, f"{name} is {flags:#x}, where it is {wanted}", config, layout.at(name))


def _packed(memory: GuestMemory, config: QueueConfig) -> Iterator[QueueViolation]:
    layout, most = config.layout(), _DESC if config.features & _EVENT_IDX else 1
    for area in ("driver", "device"):
        flags, place = (field(memory, layout, f"{area}_event.{name}") for name in ("flags", "off_wrap"))
        where = layout.at(f"{area}_event.flags")
        if flags > most:
            message = f"{area}_event.flags is {flags:#x}, where {most} is the most"
            yield _violation("EventFlagsUndefined", message, config, where)
        elif flags == _DESC and place & 0x7FFF >= config.size:
            message = f"{area}_event asks for descriptor {place & 0x7FFF} of {config.size}"
            yield _violation("EventBeyondRing", message, config, layout.at(f"{area}_event.off_wrap"))


def _violation(rule: str, message: str, config: QueueConfig, address: int) -> QueueViolation:
    return QueueViolation(rule, _CLAUSES[rule], message, queue=config.index, address=address)
