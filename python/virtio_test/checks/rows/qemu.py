"""Section 4.1: what has gone wrong in QEMU, by its id, and what comes of it here."""

from __future__ import annotations

from typing import Final

from virtio_test.checks.entry import Outcome

from .row import Meets, apart, row

__all__ = ["QEMU_ROWS"]

_D: Final = Meets.DEVICE
_T: Final = Meets.TRANSPORT
_P: Final = Meets.PROTOCOL
_C: Final = Meets.CLASS
_OURS: Final = Meets.CALLER
_SAVED: Final = "`SavedStateError`, and the device is as it was."

QEMU_ROWS: Final = (
    row(
        "CVE-2011-2212",
        _D,
        "An indirect table has more entries than a fixed array of segments.",
        by="IndirectTooLong",
        behaviour="The count is compared before anything is stored.",
        like="I08",
    ),
    row(
        "CVE-2011-2512",
        _T,
        "A queue number that is negative as a signed one is kicked.",
        by="NoSuchQueue",
        like="A17",
    ),
    row(
        "CVE-2013-4148 CVE-2013-4149 CVE-2013-4150 CVE-2013-4151 CVE-2013-4535 CVE-2013-4536 CVE-2013-4542 "
        "CVE-2013-6399 CVE-2014-0182",
        _OURS,
        "A saved state has more or longer queues, more in flight or a longer configuration than there is room for.",
        Outcome.MISUSE,
        _SAVED,
        clauses="2.6 2.5",
        like="R01 R02 R04 R06 R07",
    ),
    row(
        "CVE-2014-0150",
        _C,
        "The number of entries in a request, added to what is there, wraps 32 bits.",
        Outcome.COMPLETED,
        "A handler's bytes are counted by Python, whose integers do not wrap.",
        clauses="5.1.9.5",
        like="B19",
    ),
    row(
        "CVE-2016-5403",
        _D,
        "Buffers are made available again and again and none completes, so the host keeps ever more.",
        by="TooManyInFlight",
        like="A06",
    ),
    row(
        "CVE-2016-6490",
        _D,
        "A buffer of 0 bytes keeps a mapping loop going.",
        by="ZeroLength",
        behaviour="A copy goes on by whole segments, and an empty one is none.",
        like="B01",
    ),
    row(
        "CVE-2016-7422",
        _D,
        "A length is so large that mapping it gives nothing, or less.",
        by="UnmappedAddress",
        like="B10",
    ),
    apart("CVE-2016-6833", "A freed structure of vmxnet3 is used.", "vmxnet3 is no virtio device"),
    row(
        "CVE-2017-17381", _T, "A legacy alignment of 0 is divided by.", by="BadQueueAlign QueueSizeZero", like="Q01 Q17"
    ),
    apart(
        "CVE-2020-10717",
        "A file system daemon runs out of fds by many opens.",
        "no file system device; what a front-end sends leaves no fd open (M21)",
    ),
    row(
        "CVE-2021-3544 CVE-2021-3545 CVE-2021-3546",
        _C,
        "An error path leaks, shows memory of the host, or writes beyond a response.",
        Outcome.COMPLETED,
        "A response is the handler's bytes; what it does not write stays as the driver left it.",
        clauses="2.7.8.2",
        like="U01 U12",
    ),
    row(
        "CVE-2021-3748",
        _C,
        "A header is written to a first buffer after it was given back, as a later one was bad.",
        Outcome.DROPPED,
        clauses="2.7.8.2",
        like="U09",
    ),
    row(
        "CVE-2022-26353",
        _C,
        "An error path forgets a mapping for every malformed chain.",
        Outcome.SAFE,
        clauses="2.1.2",
        like="U12",
    ),
    row(
        "CVE-2022-26354",
        _C,
        "A chain with a bad header is never detached and counts as in flight for ever.",
        Outcome.COMPLETED,
        clauses="2.7.8",
        like="B19",
    ),
    row(
        "CVE-2023-3180",
        _C,
        "Two lengths of a request must be equal and are not compared.",
        Outcome.COMPLETED,
        "A handler writes what its chain has room for, and not a byte more.",
        clauses="2.7.8.2",
        like="U01",
    ),
    row(
        "CVE-2023-6693",
        _C,
        "A header of the driver's length is copied into a smaller one.",
        Outcome.COMPLETED,
        clauses="5.1.9",
        like="B19",
    ),
    row(
        "CVE-2024-3446",
        _D,
        "A buffer lies in the device's own registers, so that a copy enters its handler again.",
        by="UnmappedAddress",
        behaviour="Only memory is accessed, and a kick inside a handler waits for its turn.",
        like="B14 T15",
    ),
    row(
        "CVE-2024-4693",
        _T,
        "An event is told by a vector that was released.",
        Outcome.ACCEPTED,
        "The vector is looked up when the interrupt is due; without MSI-X it is the line.",
        clauses="4.1.5.1.2.1",
        like="X12 X13",
    ),
    row(
        "CVE-2024-6505",
        _C,
        "A table of the driver names queues that do not exist.",
        Outcome.COMPLETED,
        clauses="5.1.9.5",
        like="A17",
    ),
    row(
        "CVE-2024-7730",
        _C,
        "More is written to a chain than its writable buffers hold.",
        Outcome.MISUSE,
        "A write ends where the chain does, and says how much it was.",
        clauses="2.7.8.2",
        like="U01",
    ),
    row(
        "CVE-2024-8612",
        _D,
        "A used length covers bytes that were never written, and they are memory of the host.",
        Outcome.SAFE,
        "There is no bounce buffer: what is not written is as the driver left it.",
        clauses="2.7.8.2",
        like="U01",
    ),
    row(
        "CVE-2026-16457 qemu@6682ea33",
        _D,
        "A packed head is malformed, and the queue says for ever that it is not empty.",
        by="IndirectAndNext",
        behaviour="A latched queue has no work.",
        like="P15 P18",
    ),
    row(
        "CVE-2026-50626 qemu@d530f2df",
        _T,
        "A queue's size is set beyond what was allocated for it.",
        by="BadQueueSize",
        like="Q03",
    ),
    row(
        "CVE-2026-50624 qemu@0be94d8d",
        _C,
        "Entropy arrives for a request that a reset has ended.",
        Outcome.DROPPED,
        clauses="2.4.1",
        like="D09",
    ),
    row(
        "CVE-2026-48914",
        _C,
        "A block request is shorter than its type says.",
        Outcome.COMPLETED,
        "It is answered with an error of the device, or with nothing where there is no room for a status.",
        clauses="5.2.6",
        like="B19",
    ),
    apart("CVE-2026-6425", "Something in libvhost-user; nothing more is public.", "its mechanism is not known"),
    row(
        "qemu@6dbdc271",
        _D,
        "An indirect table of 0 bytes in a packed ring ends the process.",
        by="IndirectBadLen",
        like="P16",
    ),
    row(
        "qemu@d6384ad1 qemu@665c8543",
        _OURS,
        "A saved queue size, or length of the configuration, is taken unchecked.",
        Outcome.MISUSE,
        _SAVED,
        clauses="2.7 2.5",
        like="R01 R07",
    ),
    row(
        "qemu@758ef96a qemu@fbdfdbb9 qemu@b9d248df qemu@bf21298c",
        _P,
        "Indices of queues, and of a record of what is in flight, are used without a check.",
        by="InflightState InflightRegion VringIndex",
        like="R11",
    ),
    row(
        "qemu@27806d2d",
        _T,
        "A ring cannot be mapped, and the error is not looked at.",
        Outcome.BROKEN,
        by="RingUnmapped",
        like="D11 A13",
    ),
    row("qemu@733a98a5", _P, "A queue size comes by a protocol and is not checked.", by="VringSize", like="M09"),
    row(
        "qemu@df12999c",
        _OURS,
        "A device is entered again by its own access to memory.",
        Outcome.ACCEPTED,
        "A kick waits for its turn.",
        clauses="2.3",
        like="T15",
    ),
    apart(
        "qemu@67550d65",
        "An IOMMU device keeps ever more mappings.",
        "no IOMMU device; what a back-end keeps of mappings is bounded (M17)",
    ),
    row(
        "qemu@52c7bb36 qemu@77248856",
        _C,
        "A request is read beyond its end.",
        Outcome.COMPLETED,
        clauses="5.1.9",
        like="B19",
    ),
)
