"""Sections 2.9 (completion), 2.10 (notifications) and 2.11 (what changes meanwhile)."""

from __future__ import annotations

from typing import Final

from virtio_test.checks.entry import Outcome

from .row import Meets, row

__all__ = ["NOTIFY_ROWS", "RACE_ROWS", "USED_ROWS"]

_D: Final = Meets.DEVICE
_OURS: Final = Meets.CALLER

USED_ROWS: Final = (
    row("U01", _OURS, "A chain is used with more bytes than it can take.", Outcome.MISUSE, clauses="2.7.8.2 2.8.4"),
    row(
        "U02",
        _OURS,
        "A chain is used with fewer bytes than were written.",
        Outcome.ACCEPTED,
        clauses="2.7.8.2",
        differs="Recommended is that strict refuses it. The policies judge the other side, not our caller, and the "
        "clause lets a device write more than it says.",
    ),
    row(
        "U03",
        _OURS,
        "A chain is used twice, at another queue, or after a reset.",
        Outcome.MISUSE,
        "A chain of a queue that was reset or broke meanwhile is dropped, and `push` says so.",
        clauses="2.7.8 2.8.4",
    ),
    row(
        "U04",
        _D,
        "The used ring goes away while buffers are in flight.",
        by="RingUnmapped",
        behaviour="The used idx does not move unless the element was stored.",
    ),
    row("U05", _D, "The used idx wraps within a batch.", Outcome.ACCEPTED, clauses="2.7.8"),
    row(
        "U06",
        _D,
        "A driver looks at the used ring while it is written.",
        Outcome.ACCEPTED,
        "Data comes first, then the element, then the idx (packed: then the flags).",
        clauses="2.7.8.2 2.8.21",
    ),
    row(
        "U07",
        _D,
        "A batch of buffers is used.",
        Outcome.ACCEPTED,
        "All of its elements are there before one store shows them.",
        clauses="2.7.8.2",
    ),
    row(
        "U09",
        Meets.CLASS,
        "An answer takes several buffers, and a later one is bad or missing.",
        Outcome.SAFE,
        "Nothing of it is shown to the driver, and nothing is written to buffers that were given back.",
        clauses="2.7.8.2",
    ),
    row(
        "U10",
        _D,
        "With IN_ORDER, requests complete in another order.",
        Outcome.ACCEPTED,
        "They are shown in order; those that wait for their turn count as in flight.",
        clauses="2.7.9 2.8.8",
    ),
    row(
        "U11",
        Meets.DRIVER,
        "With IN_ORDER, one used entry stands for a batch.",
        Outcome.ACCEPTED,
        "What is skipped counts as written whole. Our device end shows every buffer.",
        by="UsedIdNotInFlight",
        clauses="2.7.9 2.8.8",
    ),
    row(
        "U12",
        _D,
        "Thousands of chains are malformed.",
        Outcome.SAFE,
        "No fd, mapping or counter stays behind.",
        clauses="2.1.2",
    ),
)

NOTIFY_ROWS: Final = (
    row(
        "N01",
        _D,
        "Events are asked for at any distance, over the wrap of the indices.",
        Outcome.ACCEPTED,
        "Exactly those are notified that the formula of 16 bits says.",
        clauses="2.7.7.2 2.7.10.1 2.8.10",
    ),
    row(
        "N03",
        _D,
        "A queue was just enabled, and nothing was notified yet.",
        Outcome.ACCEPTED,
        "The first time the other side is notified.",
        clauses="2.7.7.2",
    ),
    row(
        "N04",
        _D,
        "used_event is arbitrary.",
        Outcome.ACCEPTED,
        "Whoever asks for an event that does not come waits for it; nothing else follows.",
        clauses="2.7.7.2",
    ),
    row(
        "N05",
        _D,
        "With EVENT_IDX, NO_INTERRUPT is set in avail.flags.",
        Outcome.UNREAD,
        by="AvailFlagsUndefined",
        behaviour="`virtio-test check` shows it of a ring at rest.",
        clauses="2.7.7.2",
    ),
    row(
        "N06",
        _D,
        "Buffers are made available while notifications are being enabled.",
        Outcome.ACCEPTED,
        "The ring is looked at again behind a barrier, so none is missed.",
        clauses="2.7.13.4.1 2.8.21.3.1",
    ),
    row(
        "N07",
        Meets.TRANSPORT,
        "The device has broken.",
        Outcome.DROPPED,
        "No queue is notified any more; the configuration is, once.",
        by="DeviceBroken",
        clauses="2.1.2",
    ),
    row(
        "N08",
        _D,
        "A legacy driver asks to be told when the ring runs empty.",
        Outcome.ACCEPTED,
        "It is, suppressed or not.",
        clauses="6.3",
    ),
    row(
        "N10",
        _D,
        "Several buffers are used between two notifications.",
        Outcome.ACCEPTED,
        "An event that was passed counts, not only one that was hit.",
        clauses="2.7.7.2",
    ),
    row(
        "N11",
        Meets.PROTOCOL,
        "The call fd is missing, closed at its other end, or full.",
        Outcome.ACCEPTED,
        "Nobody is blocked, and no other queue notices.",
        clauses="2.3",
    ),
)

RACE_ROWS: Final = (
    row("T01", _D, "desc.len changes between its check and the copy.", Outcome.ACCEPTED, clauses="2.7.13"),
    row("T02", _D, "desc.addr changes between its translation and its use.", Outcome.ACCEPTED, clauses="2.7.13"),
    row("T03", _D, "desc.flags turn from R to W after the order was checked.", Outcome.ACCEPTED, clauses="2.7.13"),
    row("T04", _D, "desc.next changes after it was compared with the size.", Outcome.ACCEPTED, clauses="2.7.13"),
    row("T05", _D, "The avail idx changes between two loads, or is torn.", Outcome.ACCEPTED, clauses="2.7.6"),
    row(
        "T06",
        _D,
        "The avail ring's entry changes between its check and the used element.",
        Outcome.ACCEPTED,
        "The used id is what was popped.",
        clauses="2.7.8",
    ),
    row("T07", _D, "The length of an indirect table changes after its check.", Outcome.ACCEPTED, clauses="2.7.5.3"),
    row(
        "T08",
        Meets.CLASS,
        "The header of a request changes after it was checked.",
        Outcome.ACCEPTED,
        "A handler is given a copy of the bytes.",
        clauses="2.7.13",
    ),
    row("T09", _D, "The flags of a packed head change meanwhile.", Outcome.ACCEPTED, clauses="2.8.16", like="P26"),
    row(
        "T10",
        Meets.DRIVER,
        "Fields of the configuration change while they are read.",
        Outcome.ACCEPTED,
        "They are read again until the generation stands still, a bounded number of times.",
        by="ConfigNeverStable",
        clauses="2.5.1",
    ),
    row(
        "T11",
        Meets.TRANSPORT,
        "A reset races with a completion from another thread.",
        Outcome.DROPPED,
        "The completion comes before the reset whole, or not at all.",
        clauses="2.4.1",
    ),
    row(
        "T12",
        Meets.PROTOCOL,
        "The memory table changes, or a mapping goes, while chains are in flight.",
        Outcome.MISUSE,
        "The change waits for copies that run; later ones translate anew, and raise where nothing is mapped.",
        clauses="2.6",
    ),
    row(
        "T13",
        Meets.PROTOCOL,
        "The dirty log is exchanged while used elements are stored.",
        Outcome.ACCEPTED,
        "The exchange waits for accesses that run, so each is marked in one of both.",
        clauses="2.6",
    ),
    row(
        "T14",
        _OURS,
        "Two threads pop the same queue.",
        Outcome.ACCEPTED,
        "Each chain goes to one of them.",
        clauses="2.6",
        differs="Recommended is a refusal or a lock: it is a lock.",
    ),
    row(
        "T15",
        _OURS,
        "A handler kicks its own device, or changes it, while it runs.",
        Outcome.ACCEPTED,
        "The kick waits for its turn; handlers are never nested.",
        clauses="2.3",
    ),
)
