"""Sections 2.1 (avail ring and heads) and 2.2 (walking a chain): the split ring."""

from __future__ import annotations

from typing import Final

from virtio_test.checks.entry import Outcome

from .row import Meets, row

__all__ = ["CHAIN_ROWS", "HEAD_ROWS"]

_D: Final = Meets.DEVICE

HEAD_ROWS: Final = (
    row("A01", _D, "The avail idx is further ahead than the queue is long.", by="AvailIdxTooFar"),
    row("A02", _D, "The avail idx is ahead by exactly the queue size.", Outcome.ACCEPTED, clauses="2.7.6"),
    row("A03", _D, "The avail idx wraps from 65535 to 0 on the way.", Outcome.ACCEPTED, clauses="2.7.6"),
    row("A04", _D, "An avail ring entry is no index of the descriptor table.", by="HeadOutOfRange"),
    row(
        "A05",
        _D,
        "One head is made available twice while it is in flight.",
        behaviour="Each pop is a chain of its own; a completion is never taken for that of the other.",
        by="HeadInFlight",
    ),
    row("A06", _D, "Every slot of the avail ring holds the same head.", by="HeadInFlight TooManyInFlight"),
    row(
        "A07",
        _D,
        "Two heads lead to chains that share descriptors.",
        Outcome.ACCEPTED,
        "Both are handed out whole; seeing it would cost a mark for every descriptor.",
        clauses="2.7.13",
    ),
    row(
        "A08",
        _D,
        "Reserved bits of avail.flags are set.",
        Outcome.UNREAD,
        "Bit 0 alone counts; `virtio-test check` shows it of a ring at rest.",
        by="AvailFlagsUndefined",
    ),
    row(
        "A09",
        _D,
        "The avail idx goes back: behind what was consumed, or partly.",
        (Outcome.BROKEN, Outcome.BROKEN),
        "Behind what was consumed it is too far ahead for either policy. A step back that stays ahead of it cannot be "
        "seen in the value: interop takes what was published when idx was read, strict reads it again and remembers.",
        by="AvailIdxTooFar AvailIdxDecreased",
    ),
    row(
        "A10",
        _D,
        "The avail idx goes back between looking for work and taking it.",
        Outcome.BROKEN,
        "What was published when idx was read stays published: interop hands it out, and then finds idx behind what "
        "was consumed. Strict reads idx again, and finds it before.",
        by="AvailIdxTooFar AvailIdxDecreased",
        differs="Recommended is that pop finds nothing, without an error. That takes two loads for each look where one "
        "does, and a driver must not take back what it published (2.7.6.1).",
    ),
    row(
        "A13",
        _D,
        "A part of the ring lies in a hole, in a device's registers or in memory that cannot be written.",
        by="RingUnmapped",
        behaviour="Where it is so from the start no queue comes to be; where the memory goes later, the queue breaks.",
    ),
    row(
        "A14",
        _D,
        "The driver writes into the used ring or moves the used idx.",
        Outcome.UNREAD,
        "The device keeps its own used idx and overwrites the ring's.",
        clauses="2.7.8",
    ),
    row(
        "A15",
        _D,
        "The driver writes 0xFFFF to used.flags.",
        Outcome.UNREAD,
        "The next change of what the device asks for makes it 0 or 1; `virtio-test check` shows it of a ring at rest.",
        by="UsedFlagsUndefined",
    ),
    row(
        "A16",
        _D,
        "A queue is kicked, again and again, with nothing available.",
        Outcome.ACCEPTED,
        "Each look is one load, and nothing is notified.",
        clauses="2.7.10.2",
    ),
    row(
        "A17",
        Meets.TRANSPORT,
        "A queue is kicked that does not exist, or the value of the kick is not that of its place.",
        Outcome.UNREAD,
        "The place names the queue. What names none has no effect and is counted where the transport can see it.",
        by="NoSuchQueue NotificationValue",
    ),
    row(
        "A18",
        Meets.TRANSPORT,
        "Buffers are made available, and the queue is kicked, before DRIVER_OK.",
        Outcome.NOTED,
        "Nothing is used before DRIVER_OK, and all of it after it without another kick.",
        by="NotifiedEarly",
    ),
)

CHAIN_ROWS: Final = (
    row("C01", _D, "The next field of a chained descriptor is beyond the table.", by="NextOutOfRange"),
    row("C02", _D, "A descriptor links itself.", by="ChainTooLong"),
    row("C03", _D, "Descriptors link each other in a cycle, with or without the head.", by="ChainTooLong"),
    row("C04", _D, "A chain has exactly as many descriptors as the queue.", Outcome.ACCEPTED, clauses="2.7.5"),
    row(
        "C05",
        _D,
        "A chain has more descriptors than the queue: by a loop, or by the entries of its table.",
        (Outcome.ACCEPTED, Outcome.BROKEN),
        "A loop breaks both. Through a table interop takes as many as its limit, 1024, on top of the direct ones.",
        by="ChainTooLong",
        peer="drivers of Windows make chains of up to 515 descriptors whatever the size of the queue",
    ),
    row("C06", _D, "The next field is garbage where NEXT is not set.", Outcome.UNREAD, clauses="2.7.5"),
    row(
        "C07",
        _D,
        "A device-readable descriptor follows a device-writable one.",
        by="OutOfOrder",
        behaviour="`Policy(mixed_order=True)` accepts it.",
    ),
    row(
        "C08",
        Meets.CLASS,
        "A chain has only descriptors of the wrong direction for its queue.",
        Outcome.COMPLETED,
        "It is counted (`rejected`); the ring itself is right.",
        clauses="2.7.4.1",
    ),
    row("C09", _D, "Unknown flags of a descriptor are set.", Outcome.UNREAD, clauses="2.7.5"),
    row("C10", _D, "The only descriptor of a chain has length 0.", by="ZeroLength", like="B01"),
    row("C11", _D, "A part of the ring is not aligned.", by="RingMisaligned"),
    row(
        "C12",
        _D,
        "Descriptor table, avail ring and used ring lie over each other.",
        Outcome.SAFE,
        "What the device writes may be a broken rule when it is read again; no access leaves guest memory.",
        clauses="2.7.1",
    ),
    row(
        "C13",
        _D,
        "A chain changes while it is walked.",
        Outcome.ACCEPTED,
        "Each field is read once, so the chain is what it was at some moment.",
        clauses="2.7.13",
        like="T01 T02 T03 T04",
    ),
)
