"""Section 2.8: a PCI function before a hostile driver, and our driver before a hostile function."""

from __future__ import annotations

from typing import Final

from virtio_test.checks.entry import Outcome
from virtio_test.checks.functions import PCI_ENTRIES

from .row import Meets, row

__all__ = ["PCI_ROWS"]

_T: Final = Meets.TRANSPORT

PCI_ROWS: Final = (
    row(
        "X01",
        _T,
        "Every register is accessed with every width at every offset.",
        by="AccessWidth ConfigAccess RegisterWidth NoSuchRegister",
        behaviour="Another width reads as ones, or as zeros where nothing is; a write of it has no effect.",
    ),
    row(
        "X02",
        _T,
        "A vector is written that the MSI-X table does not have.",
        by="BadVector",
        behaviour="It reads back as NO_VECTOR.",
    ),
    row(
        "X03",
        _T,
        "A kick has an odd place or width, or is beyond the last queue.",
        by="BadNotification NotificationValue AccessWidth",
        behaviour="Where place and value differ, the place counts.",
    ),
    row(
        "X04",
        _T,
        "ISR is read by more than its byte, or written.",
        by="ReadOnlyRegister",
        behaviour="A read that holds byte 0 clears it; a write has no effect.",
    ),
    row(
        "X05",
        _T,
        "The window to the BARs is aimed at no BAR, beyond one, at itself, or with another length than 1, 2 or 4.",
        by="BadWindow",
        behaviour="It reads as ones, and a write has no effect.",
    ),
    row("X06", _T, "A huge word of features is selected.", Outcome.UNREAD, "It reads as 0.", clauses="4.1.4.3"),
    row("X07", _T, "Registers that can only be read are written.", by="ReadOnlyRegister"),
    row(
        "X08",
        _T,
        "The configuration changes between two reads.",
        Outcome.ACCEPTED,
        "The generation is another after every change that a read could have seen, after 256 of them too.",
        clauses="2.5",
    ),
    row(
        "X09",
        _T,
        "The configuration space is empty, or accessed beyond its end.",
        by="ConfigOutOfRange",
        behaviour="It reads as ones there (PCI), or as zeros (MMIO).",
    ),
    row(
        "X10",
        _T,
        "Queues are kicked, or memory is accessed, while the function does not decode or is no bus master.",
        Outcome.UNREAD,
        "BARs do not answer, and the device neither writes nor sends messages until it may.",
        clauses="4.1.1",
    ),
    row(
        "X11",
        _T,
        "The function is reset, by its status or by FLR, while requests are in flight.",
        Outcome.DROPPED,
        clauses="2.4.1 4.1.1",
        like="D09",
    ),
    row(
        "X12",
        _T,
        "The vector of a queue changes while requests are in flight.",
        Outcome.ACCEPTED,
        "The next interrupt has the new one.",
        clauses="4.1.5.1.2.1",
    ),
    row(
        "X13",
        _T,
        "A vector, or all of them, are masked when an interrupt is due.",
        Outcome.ACCEPTED,
        "It is pending, and one message goes out when it may.",
        clauses="4.1.1",
    ),
    row(
        "X14",
        _T,
        "An event has no vector while MSI-X is on.",
        Outcome.ACCEPTED,
        "There is no interrupt.",
        clauses="4.1.5.1.2.1",
    ),
    row(
        "X15",
        _T,
        "Interrupts come by the line.",
        Outcome.ACCEPTED,
        "The bit in ISR is there before the line is raised; reading ISR and a reset lower it.",
        clauses="4.1.4.5.1",
    ),
    row(
        "X16",
        _T,
        "A queue beyond num_queues is selected.",
        Outcome.UNREAD,
        "It is there only for a driver that accepted ADMIN_VQ, among the administration virtqueues.",
        clauses="4.1.4.3.1",
        by="NoSuchQueue",
    ),
    row(
        "X-capabilities",
        Meets.DRIVER,
        "A function shows capabilities, BARs or registers that cannot be.",
        Outcome.UNUSED,
        "Every list, sum and wait is bounded.",
        by=" ".join(entry.name for entry in PCI_ENTRIES),
        clauses="4.1.4",
    ),
)
