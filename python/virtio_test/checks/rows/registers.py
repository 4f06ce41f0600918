"""Sections 2.6 (queue configuration) and 2.7 (status, features, reset)."""

from __future__ import annotations

from typing import Final

from virtio_test.checks.entry import Outcome

from .row import Meets, row

__all__ = ["QUEUE_ROWS", "STATUS_ROWS"]

_T: Final = Meets.TRANSPORT
_BROKEN_LATER: Final = "Refused where a queue is made; behind registers, which cannot refuse, the device breaks (D11)."

QUEUE_ROWS: Final = (
    row("Q01", _T, "The size of a queue is written as 0.", by="BadQueueSize QueueSizeZero"),
    row("Q02", _T, "The size of a split queue is no power of two.", by="BadQueueSize QueueSizeNotPowerOfTwo"),
    row(
        "Q03",
        _T,
        "A size is written that is larger than what the device offers.",
        by="BadQueueSize QueueSizeTooBig",
        behaviour="The size that was there stays.",
    ),
    row(
        "Q04",
        _T,
        "A size is beyond 32768, or has more bits than its field.",
        by="BadQueueSize QueueSizeTooBig VringSize",
        behaviour="It is compared before it is made any smaller.",
    ),
    row(
        "Q05",
        _T,
        "Size, addresses or vector of a queue are written while it is enabled.",
        by="EnabledQueueWritten",
        differs="A vector may be changed: the next interrupt uses the new one (4.1.5.1.2.1, X12).",
    ),
    row(
        "Q06",
        _T,
        "A queue is enabled twice, or with another value than 1.",
        by="EnabledQueueWritten BadQueueEnable BadQueueReady",
    ),
    row(
        "Q07",
        _T,
        "A queue is enabled whose addresses nobody wrote.",
        Outcome.BROKEN,
        "They are 0. Where that is no memory the device breaks; where it is, the parts lie over each other (Q10).",
        by="RingUnmapped QueueSizeZero",
    ),
    row(
        "Q08", _T, "A queue is enabled whose parts are not aligned.", Outcome.BROKEN, _BROKEN_LATER, by="RingMisaligned"
    ),
    row(
        "Q09",
        _T,
        "A ring ends where memory ends, one byte behind it, or wraps.",
        Outcome.BROKEN,
        f"The first is accepted. {_BROKEN_LATER}",
        by="RingUnmapped BadQueueAddress",
    ),
    row("Q10", _T, "The rings of one queue, or of two, lie over each other.", Outcome.SAFE, clauses="2.7.1 2.8.11"),
    row(
        "Q11",
        _T,
        "One half of an address is never written, or is written after the queue was enabled.",
        by="EnabledQueueWritten",
        behaviour="A half that nobody wrote is 0; what comes too late has no effect.",
    ),
    row("Q12", _T, "A queue is selected that does not exist.", by="NoSuchQueue", behaviour="Its registers read as 0."),
    row(
        "Q13",
        _T,
        "A queue is reset alone while buffers are in flight, which complete later.",
        Outcome.DROPPED,
        "The queue has a new generation, and a chain of the old one writes nothing.",
        clauses="2.6.1.1.1",
    ),
    row(
        "Q14",
        _T,
        "A queue is reset alone without the feature, or with another value than 1.",
        by="QueueResetNotNegotiated BadQueueReset",
    ),
    row(
        "Q15",
        _T,
        "A queue has another size and other addresses after its reset.",
        Outcome.ACCEPTED,
        "A queue that is not there again is a broken rule of the device.",
        by="QueueGone",
        clauses="2.6.1.2.1 2.6.1.1",
    ),
    row("Q16", _T, "DRIVER_OK is set with no queue enabled.", Outcome.ACCEPTED, "Nothing runs.", clauses="3.1.1"),
    row(
        "Q17",
        _T,
        "A legacy driver writes an alignment, or a page size, that is 0 or no power of two.",
        by="BadQueueAlign BadGuestPageSize NoGuestPageSize BadQueueAddress",
    ),
)

STATUS_ROWS: Final = (
    row(
        "D01",
        _T,
        "FEATURES_OK is set over features that were not offered.",
        by="BadFeatures FeatureNotOffered Version1NotAccepted",
        behaviour="FEATURES_OK reads back clear.",
    ),
    row("D02", _T, "Features are written after FEATURES_OK.", by="FeaturesAfterOk"),
    row(
        "D03",
        _T,
        "A feature is accepted without those that it requires, or over a transport that does not have it.",
        by="BadFeatures RequirementNotAccepted TransportNotSupported RequirementNotOffered",
        behaviour="FEATURES_OK reads back clear. A device of our own that offers such a set cannot be made.",
    ),
    row("D04", _T, "DRIVER_OK is set without FEATURES_OK.", by="DriverOkWithoutFeaturesOk"),
    row("D05", _T, "Status bits are cleared by a write other than 0.", by="StatusBitCleared"),
    row("D06", _T, "The driver writes DEVICE_NEEDS_RESET.", by="DriverSetNeedsReset"),
    row("D07", _T, "Undefined status bits are written.", by="UndefinedStatusBit"),
    row(
        "D08",
        _T,
        "The device is reset: in any state, broken, in the middle of a request, twice.",
        Outcome.ACCEPTED,
        "The status is 0, and queues, features and vectors are as fresh.",
        clauses="2.4.1",
    ),
    row(
        "D09",
        _T,
        "The device is reset while requests are in flight, which complete later.",
        Outcome.DROPPED,
        clauses="2.4.1",
    ),
    row("D10", _T, "DRIVER_OK is written again.", Outcome.ACCEPTED, "The device is started once.", clauses="3.1.1"),
    row(
        "D11",
        _T,
        "The device cannot be started with the rings that it is given.",
        Outcome.BROKEN,
        by="RingUnmapped RingMisaligned",
        clauses="2.1.2 3.1.1",
    ),
    row(
        "D12",
        _T,
        "DRIVER_OK is set, and nothing in the configuration has changed.",
        Outcome.ACCEPTED,
        "No configuration interrupt is sent.",
        clauses="2.1.2 3.2.1",
    ),
    row(
        "D13",
        _T,
        "A driver negotiates a packed ring, resets, and negotiates a split one.",
        Outcome.ACCEPTED,
        "Nothing of the first is left.",
        clauses="2.4.1",
    ),
    row(
        "D14",
        _T,
        "Words of features are selected that do not exist.",
        by="FeatureNotOffered",
        behaviour="They read as 0. A write of 0 is nothing, of any other value it is noted.",
    ),
    row("D15", _T, "The status is accessed by 2 or 4 bytes.", by="StatusWidth AccessWidth"),
    row(
        "D16",
        _T,
        "The device broke; the driver resets it and starts again.",
        Outcome.ACCEPTED,
        "It told so once, by DEVICE_NEEDS_RESET and one configuration interrupt, and serves as before.",
        by="DeviceBroken",
        clauses="2.1.1 2.1.2",
    ),
    row(
        "D17",
        _T,
        "SUSPEND is set without its feature, before DRIVER_OK, or twice; buffers come while suspended.",
        by="SuspendNotPossible",
        behaviour="Suspended, no queue is touched and nobody is notified; buffers wait for the resumption.",
        clauses="3.4.1 3.4.2",
    ),
)
