"""Sections 4.2 to 4.4: what has gone wrong in Linux, DPDK, other monitors and libraries, by its id.

The vulnerabilities of DPDK are those that the catalogue's other sections name.
"""

from __future__ import annotations

from typing import Final

from virtio_test.checks.entry import Outcome

from .row import Meets, apart, row

__all__ = ["DPDK_ROWS", "LINUX_ROWS", "VMM_ROWS"]

_D: Final = Meets.DEVICE
_T: Final = Meets.TRANSPORT
_P: Final = Meets.PROTOCOL
_C: Final = Meets.CLASS
_OURS: Final = Meets.CALLER
_SAVED: Final = "`SavedStateError`, and the device is as it was."

LINUX_ROWS: Final = (
    row(
        "CVE-2019-14835",
        _P,
        "With a dirty log, entries are written for buffers of no bytes, beyond their array.",
        Outcome.ACCEPTED,
        "What writes no byte marks no page, and a mark is made by the write itself.",
        clauses="2.7.5",
        like="M15 B01",
    ),
    row(
        "CVE-2019-3900",
        _D,
        "A driver makes buffers available as fast as they are used, and the device never does anything else.",
        Outcome.ACCEPTED,
        "One turn of a queue is bounded; then others have theirs.",
        clauses="2.7.14",
    ),
    apart(
        "CVE-2020-10942",
        "A socket's family is read beyond a stack buffer.",
        "an ioctl of the kernel; no ring is part of it",
    ),
    row(
        "CVE-2018-1118",
        _P,
        "A message shows memory that nobody wrote.",
        Outcome.ACCEPTED,
        "A message is packed whole; its padding is zeros.",
        clauses="vhost-user:Header",
    ),
    row("CVE-2023-5158", _D, "A buffer of 0 bytes keeps a copy going for ever.", by="ZeroLength", like="B01"),
    apart("CVE-2026-23069", "A socket's credit goes below 0.", "no socket device"),
    apart(
        "CVE-2026-46207",
        "A monitor of sockets copies memory that nobody wrote.",
        "code of the kernel's sockets; no ring is part of it",
    ),
)

DPDK_ROWS: Final = (
    row("CVE-2018-1059", _D, "Only the first byte of a buffer is looked up.", by="UnmappedAddress", like="B05 B06"),
    row(
        "CVE-2019-14818",
        _P,
        "A message that is refused leaves its fds open.",
        Outcome.SAFE,
        by="FdCount",
        like="M03 M21",
    ),
    row(
        "CVE-2020-10722",
        _P,
        "The size of a dirty log, and where it begins, wrap when they are added.",
        by="LogRange",
        like="M15",
    ),
    row("CVE-2020-10723", _P, "An index of 32 bits is cut to 16 and used.", by="VringIndex VringSize", like="Q04"),
    apart("CVE-2020-10724", "A crypto session has impossible key lengths.", "no device here has crypto sessions (M19)"),
    row(
        "CVE-2020-10725",
        _D,
        "The address of a packed buffer of 0 bytes is used unchecked.",
        by="ZeroLength",
        like="P30",
    ),
    row(
        "CVE-2020-10726",
        _P,
        "Messages that are refused keep ever more.",
        Outcome.SAFE,
        clauses="vhost-user:Communication",
        like="U12 M21",
    ),
    row(
        "CVE-2020-14374 CVE-2020-14375 CVE-2020-14376 CVE-2020-14377 CVE-2020-14378",
        _C,
        "A request's header is read again from guest memory after it was checked.",
        Outcome.ACCEPTED,
        "A handler is given a copy of the bytes.",
        clauses="2.7.13",
        like="T08 T01",
    ),
    row(
        "CVE-2022-2132",
        _C,
        "A chain is shorter than the header, which goes on in another descriptor.",
        Outcome.COMPLETED,
        clauses="2.7.4.1",
        like="B19",
    ),
)

VMM_ROWS: Final = (
    row("CVE-2019-18960", _D, "A packet's buffer goes beyond its region.", by="UnmappedAddress", like="B06 B08"),
    row(
        "CVE-2020-16843",
        _D,
        "Buffers are made available just as the device stops to listen, and no notification comes.",
        Outcome.ACCEPTED,
        "The ring is looked at again behind a barrier.",
        clauses="2.7.10.2 2.8.10",
        like="N06",
    ),
    apart(
        "CVE-2020-27174",
        "A serial port's buffer has no bound.",
        "no virtio device; the input that a console of ours keeps is bounded",
    ),
    row(
        "CVE-2026-5747 GHSA-776c-mpj7-jm3r",
        _T,
        "Size and addresses of a queue are changed while it is enabled.",
        by="EnabledQueueWritten BadQueueSize",
        like="Q05",
    ),
    row("firecracker#5353", _T, "A vector beyond the table is used as an index.", by="BadVector", like="X02"),
    row(
        "CVE-2026-45782",
        _C,
        "A block request completes after its queue has gone.",
        Outcome.DROPPED,
        clauses="2.4.1",
        like="D09 T11",
    ),
    row(
        "cloud-hypervisor@082fdc4d0",
        _T,
        "A queue is selected that does not exist, and used as an index.",
        Outcome.UNREAD,
        "Its registers read as 0.",
        by="NoSuchQueue",
        clauses="4.1.4.3.1",
        like="Q12 X16",
    ),
    row("cloud-hypervisor@3b431afba", _T, "A vector beyond the table is used as an index.", by="BadVector", like="X02"),
    row(
        "cloud-hypervisor@22eeb3f80 cloud-hypervisor@2d2931a76",
        _T,
        "A queue that cannot be is started, and nobody hears that it failed.",
        Outcome.BROKEN,
        by="RingUnmapped RingMisaligned",
        like="Q07 D11",
    ),
    apart("cloud-hypervisor@778c9f53d", "A length of a socket's packet is trusted.", "no socket device"),
    row(
        "cloud-hypervisor@cfec13077",
        _T,
        "A capability's registers are accessed beyond their end.",
        by="BadWindow AccessWidth",
        like="X01 X05",
    ),
    row(
        "cloud-hypervisor@fe6bcd037",
        _T,
        "A reset leaves something of before.",
        Outcome.ACCEPTED,
        "Queues, features and vectors are as fresh.",
        clauses="2.4.1",
        like="D08",
    ),
    row(
        "CVE-2023-41051 RUSTSEC-2023-0056",
        _OURS,
        "Memory that a program of ours provides gives fewer bytes than were asked for.",
        Outcome.MISUSE,
        "Of a remote region every answer is counted; the transfer fails.",
        clauses="2.6",
    ),
    row(
        "CVE-2023-50711 GHSA-875g-mfp6-g7f9",
        _OURS,
        "A saved state says that it is longer than it is.",
        Outcome.MISUSE,
        _SAVED,
        clauses="2.6",
        like="R01 R06",
    ),
    row(
        "virtio-queue@0.4",
        _T,
        "A queue of size 0 is divided by.",
        by="BadQueueSize QueueSizeZero",
        like="Q01",
    ),
    row("virtio-queue#196", _D, "The avail idx says that more is there than can be.", by="AvailIdxTooFar", like="A01"),
    row(
        "virtio-queue@0.7.1",
        _D,
        "A legal indirect table is refused as it is not aligned.",
        Outcome.ACCEPTED,
        clauses="2.7.5.3",
        like="I10",
    ),
    row("virtio-queue@0.8", _D, "A chain of more than 2^32 bytes is taken.", by="ChainTooBig", like="B09"),
    row(
        "vm-memory#97",
        _D,
        "An index is read in two halves while the driver writes it.",
        Outcome.ACCEPTED,
        "Indices are atomic words.",
        clauses="2.7.6",
        like="T05",
    ),
    row("mvm#1860", _T, "A size of 65536 becomes 0 and is divided by.", by="BadQueueSize VringSize", like="Q01 Q04"),
    row(
        "openvmm#2983",
        _D,
        "A packed ring of an odd size, or of size 0, wraps wrongly.",
        Outcome.ACCEPTED,
        by="QueueSizeZero",
        clauses="2.8 2.8.1",
        like="P09 P11 P12 P13",
    ),
    row(
        "openvmm#3934",
        _T,
        "A device without configuration space is asked for it.",
        Outcome.IGNORED,
        by="ConfigOutOfRange",
        like="X09",
    ),
    row(
        "openvmm#3990 openvmm#4047",
        _D,
        "Address and offset wrap, or a list fills the ring exactly.",
        by="AddressWraps",
        like="B04 P09",
    ),
    row(
        "openvmm#2986 openvmm#4045 openvmm#4046 openvmm#4048 openvmm#4145",
        _D,
        "A malformed ring keeps the device busy for ever, or a region overflows.",
        by="AvailIdxTooFar RegionWrap",
        like="A01 P18 M05",
    ),
    row(
        "openvmm#4049 openvmm#4226",
        _T,
        "A configuration interrupt comes at DRIVER_OK for nothing.",
        Outcome.ACCEPTED,
        "None is sent.",
        clauses="2.1.2 3.2.1",
        like="D12",
    ),
    row(
        "vmd-2021",
        _C,
        "A length of the driver's is used to fill an object of the device.",
        Outcome.COMPLETED,
        "A handler gets at most the bytes that it asked for.",
        clauses="2.7.4.1",
        like="B19",
    ),
)
