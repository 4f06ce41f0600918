"""The rules of protocols: each protocol's own table, and what follows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from virtio_test.carrier.vfio_user import rules as vfio_user
from virtio_test.transport.vhost_user import rules as vhost_user

from .entry import Entry, Outcome

__all__ = ["MESSAGE_ENTRIES"]

_REFUSED: Final = frozenset(
    {"NotSupported", "UnknownCommand", "DmaFlags", "DmaRange", "DmaExists", "DmaFile", "DmaSlots", "UnmapFlags"}
    | {"UnmapSplit", "ArgumentSize", "RegionIndex", "RegionRange", "TransferSize", "WriteMulti", "IrqIndex"}
    | {"IrqFlags", "IrqRange", "IrqData", "IrqFd"}
)
"""vfio-user: well-formed commands that cannot be honoured."""

_FRAMING: Final = frozenset(
    {"BadVersion", "ReservedFlags", "ReplyFlag", "MessageTooLong", "PayloadSize", "Truncated", "FdCount"}
    | {"UnexpectedReply", "RepliesUnread", "InbandAlone"}
)
"""vhost-user: nothing behind such a message can be trusted."""

_CLIENT: Final = frozenset({"CommandRefused", "Refused", "ConfigSize"})
"""What only our own front-end or client can find: the other side refuses what it must not."""

_UML: Final = {
    "CommandShort": "A command has its whole header.",
    "UnknownCommand": "A command is one of those that the kernel's header defines.",
    "CommandSize": "A configuration access has 1, 2, 4 or 8 bytes.",
    "NoSuchBar": "A command names a BAR of the function.",
    "CommandRange": "An access lies within its BAR, or the configuration space.",
    "CommandData": "A write carries its data.",
    "CommandRoom": "A read has room for the bytes that it asks for.",
    "InterruptRoom": "A buffer for interrupts has room for one.",
}


def _entry(name: str, family: str, section: str, summary: str, outcome: Outcome, rows: str = "") -> Entry:
    return Entry(
        name=name,
        family=family,
        clauses=(section,),
        summary=f"{summary[0].upper()}{summary[1:].removesuffix('.')}.",
        interop=outcome,
        strict=outcome,
        rows=tuple(rows.replace(",", " ").split()),
    )


def _of_vhost_user() -> Iterable[Entry]:
    for rule in vhost_user.MESSAGE_RULES.values():
        outcome = Outcome.RAISED if rule.name in _CLIENT else Outcome.JUDGED
        outcome = Outcome.ENDED if rule.name in _FRAMING else outcome
        yield _entry(rule.name, "vhost-user", rule.section, rule.summary, outcome, rule.row)


def _of_vfio_user() -> Iterable[Entry]:
    for rule in vfio_user.MESSAGE_RULES.values():
        outcome = Outcome.RAISED if rule.name in _CLIENT else Outcome.ENDED
        outcome = Outcome.ANSWERED if rule.name in _REFUSED else outcome
        yield _entry(rule.name, "vfio-user", rule.section, rule.summary, outcome)


def _of_uml() -> Iterable[Entry]:
    for name, summary in _UML.items():
        yield _entry(name, "uml-pci", "linux/virtio_pcidev.h", summary, Outcome.IGNORED)


MESSAGE_ENTRIES: Final = (*_of_vhost_user(), *_of_vfio_user(), *_of_uml())
