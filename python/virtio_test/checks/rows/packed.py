"""Section 2.5: the packed ring."""

from __future__ import annotations

from typing import Final

from virtio_test.checks.entry import Outcome

from .row import Meets, row

__all__ = ["PACKED_ROWS"]

_D: Final = Meets.DEVICE

PACKED_ROWS: Final = (
    row("P01", _D, "The ring is fresh and all zeros.", Outcome.ACCEPTED, "It is empty.", clauses="2.8.1"),
    row(
        "P02",
        _D,
        "AVAIL and USED of a descriptor are equal.",
        Outcome.ACCEPTED,
        "It is not available.",
        clauses="2.8.1",
    ),
    row(
        "P03",
        _D,
        "A descriptor is as the lap before made it available.",
        Outcome.ACCEPTED,
        "It is not available.",
        clauses="2.8.1",
    ),
    row("P04", _D, "The head of a list is available and a later descriptor of it is not.", by="ChainNotAvail"),
    row("P05", _D, "NEXT is set in every descriptor of the ring.", by="ChainTooLong"),
    row(
        "P06",
        _D,
        "A buffer id is not below the queue size.",
        Outcome.ACCEPTED,
        "An id is 16 bits of the driver's own; nothing is indexed with it.",
        clauses="2.8.6",
    ),
    row("P07", _D, "One buffer id is given to two buffers in flight.", by="IdInFlight"),
    row(
        "P09",
        _D,
        "A list goes over the end of the ring.",
        Outcome.ACCEPTED,
        "The wrap counter turns once.",
        clauses="2.8.1",
    ),
    row("P11", _D, "The size of the queue is no power of two.", Outcome.ACCEPTED, clauses="2.8"),
    row("P12", _D, "The queue has one descriptor.", Outcome.ACCEPTED, "Each buffer is a lap.", clauses="2.8"),
    row(
        "P13",
        _D,
        "The size of the queue is 0 or beyond 32768.",
        by="QueueSizeZero QueueSizeTooBig QueueSizeNotPowerOfTwo",
        behaviour="A split ring's must be a power of two as well (Q02).",
    ),
    row(
        "P14",
        _D,
        "Entries of an indirect table have reserved flags or ids.",
        by="NestedIndirect",
        behaviour="All but WRITE is ignored, by both policies but for INDIRECT, which strict refuses.",
    ),
    row(
        "P15",
        _D,
        "INDIRECT comes with NEXT, or behind direct descriptors.",
        by="IndirectAndNext IndirectAfterDirect",
    ),
    row("P16", _D, "An indirect table has length 0.", by="IndirectBadLen"),
    row(
        "P18",
        _D,
        "A malformed head stays at the front of the ring.",
        by="IndirectAndNext",
        behaviour="A latched queue has no work, so no loop over it goes round for ever.",
    ),
    row(
        "P19",
        _D,
        "A used descriptor's flags: WRITE where something was written, the wrap bits, nothing else.",
        (Outcome.ACCEPTED, Outcome.FAILED),
        "Our device end sets exactly these. Our driver end takes the length without WRITE under interop; strict takes "
        "it as 0, and a request that needs an answer fails.",
        by="UsedLengthShort",
        clauses="2.8.3 2.8.4 2.8.6",
        peer="QEMU and OpenVMM never set WRITE in packed used descriptors",
    ),
    row(
        "P20",
        _D,
        "Lists of several descriptors are used in another order.",
        Outcome.ACCEPTED,
        "A used descriptor skips as many as its own list had.",
        clauses="2.8.12 2.8.22",
    ),
    row(
        "P21",
        _D,
        "A completion goes over the end of the ring.",
        Outcome.ACCEPTED,
        "The used wrap counter turns.",
        clauses="2.8.1",
    ),
    row(
        "P22",
        _D,
        "Event flags are reserved, or ask for a place without EVENT_IDX.",
        Outcome.ACCEPTED,
        "The driver is notified; `virtio-test check` shows it of a ring at rest.",
        by="EventFlagsUndefined",
    ),
    row(
        "P23",
        _D,
        "The place of an event is beyond the ring, or of another lap.",
        Outcome.ACCEPTED,
        "The driver is notified where the formula cannot say; `virtio-test check` shows it of a ring at rest.",
        by="EventBeyondRing",
    ),
    row(
        "P24",
        _D,
        "Slots are made available again while their buffers are in flight.",
        by="TooManyInFlight",
        behaviour="A slot that was already consumed is looked at only when its turn comes again.",
    ),
    row(
        "P25",
        _D,
        "A descriptor changes after it was made available.",
        Outcome.ACCEPTED,
        "Each field is read once.",
        clauses="2.8.16",
    ),
    row(
        "P26",
        _D,
        "A head is made unavailable between looking for work and taking it.",
        Outcome.ACCEPTED,
        "There is nothing to pop.",
        clauses="2.8.16",
    ),
    row(
        "P27",
        _D,
        "Flags are read without a barrier, so address and length may be older.",
        Outcome.ACCEPTED,
        "Flags are loaded first, with acquire.",
        clauses="2.8.21.1.1 2.8.15",
    ),
    row(
        "P28",
        _D,
        "A batch is used whose flags are stored in any order.",
        Outcome.ACCEPTED,
        "Flags are stored after id and length, and those of the first descriptor last.",
        clauses="2.8.21 2.8.12",
    ),
    row("P29", _D, "A device-readable descriptor follows a device-writable one.", by="OutOfOrder", like="C07"),
    row("P30", _D, "A descriptor has length 0.", by="ZeroLength", like="B01"),
    row("P32", _D, "A queue goes on from an index beyond its ring, with any wrap bit.", by="StateOutOfRange"),
)
