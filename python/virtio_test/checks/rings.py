"""The rules of rings, in the order of the core: what is broken by whom, and what implementations do with it.

Names, clauses and summaries are the core's own (`rules()`). The rest is told from the sources of other
implementations as they stood between February 2025 and August 2026.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from virtio_test._core import rules

from .entry import Entry, Outcome

__all__ = ["RING_ENTRIES"]


class _Told(NamedTuple):
    """What the core does not know of its rule."""

    rows: str
    practice: str
    interop: Outcome = Outcome.BROKEN
    strict: Outcome = Outcome.BROKEN
    peer: str = ""


_REFUSED: Final = (Outcome.REFUSED, Outcome.REFUSED)
_USED: Final = (Outcome.LATCHED, Outcome.LATCHED)
_TOLERATED: Final = (Outcome.ACCEPTED, Outcome.BROKEN)

_TOLD: Final = {
    "QueueSizeZero": _Told(
        "Q01 Q07 P13 G16",
        "Dividing by a size of 0 has been a fault of Firecracker, of libvhost-user and of early rust-vmm queues. Linux "
        "refuses a size that is no power of two.",
        *_REFUSED,
    ),
    "QueueSizeNotPowerOfTwo": _Told(
        "Q02 G16",
        "rust-vmm, Firecracker, crosvm, libkrun, OpenVMM and vhost check it; QEMU does not; DPDK stores it before it "
        "looks.",
        *_REFUSED,
    ),
    "QueueSizeTooBig": _Told(
        "Q03 Q04 P13 G16",
        "A size of 32 bits that is cut to 16 has become 0 or small in DPDK (CVE-2020-10723) and others.",
        *_REFUSED,
    ),
    "RingMisaligned": _Told(
        "C11 Q08",
        "rust-vmm, Firecracker, crosvm and libkrun check all three areas, vhost only two; QEMU, OpenVMM and DPDK use "
        "what they are given.",
        *_REFUSED,
    ),
    "RingUnmapped": _Told(
        "A13 Q09 U04",
        "QEMU breaks the device, OpenVMM the queue, Firecracker fails the activation; crosvm and libkrun panicked.",
    ),
    "MemoryLost": _Told("M05", ""),
    "StateOutOfRange": _Told(
        "P32 R02 R09",
        "QEMU and OpenVMM refuse a saved state whose avail and used are further apart than the queue is long.",
        *_REFUSED,
    ),
    "AvailIdxTooFar": _Told(
        "A01 A09",
        "QEMU mostly pops old entries until too many are in flight; vhost and rust-vmm give an error and may be asked "
        "again for ever; vringh, crosvm, DPDK and libkrun do not look; Firecracker panicked.",
    ),
    "AvailIdxDecreased": _Told(
        "A09 A10",
        "An idx that goes back and stays ahead of what was consumed cannot be seen in its value; nobody remembers the "
        "highest one.",
        *_TOLERATED,
        "no driver is known to need it; seeing it costs a load for each chain, which only strict pays",
    ),
    "HeadOutOfRange": _Told(
        "A04",
        "QEMU breaks the device after it has counted the entry; vhost, crosvm, Firecracker, DPDK and libkrun leave the "
        "entry where it is and are stuck; rust-vmm consumes it and hands out an empty chain.",
    ),
    "HeadInFlight": _Told(
        "A05 A06",
        "Nobody keeps track of heads; QEMU limits only how many chains are in flight.",
        *_TOLERATED,
        "no driver is known to need it; back-ends in use accept it, and a completion is never confused by it",
    ),
    "IdInFlight": _Told(
        "P07",
        "No device end looks at ids.",
        *_TOLERATED,
        "no driver is known to need it; back-ends in use accept it",
    ),
    "TooManyInFlight": _Told(
        "A06 P24",
        "QEMU and OpenVMM bound what is in flight; before QEMU did, a guest could make it keep any amount of memory "
        "(CVE-2016-5403).",
    ),
    "NextOutOfRange": _Told(
        "C01 I12 I21",
        "QEMU and libvhost-user break the device; vhost, vringh, crosvm and DPDK give an error and are stuck; "
        "rust-vmm, Firecracker and libkrun hand out the part before it as if it were whole.",
    ),
    "ChainTooLong": _Told(
        "C02 C03 C05 I13 P05",
        "QEMU breaks the device; libvhost-user counts segments, not descriptors; rust-vmm and Firecracker cut the "
        "chain off; DPDK had several loops without end, and QEMU one when it dropped a packed list.",
    ),
    "ChainTooBig": _Told(
        "B09",
        "crosvm and Firecracker give an error, rust-vmm cuts the chain off at 2^32, DPDK's 32-bit sum wraps, QEMU has "
        "no limit.",
    ),
    "ChainNotAvail": _Told(
        "P04",
        "QEMU and DPDK look at the first descriptor only; OpenVMM stops the queue; crosvm panicked when it completed "
        "such a list.",
    ),
    "OutOfOrder": _Told(
        "C07 P29",
        "QEMU and libvhost-user break the device, vhost, vringh and crosvm give an error; rust-vmm and OpenVMM accept "
        "it, and DPDK's network path never looks at WRITE.",
    ),
    "ZeroLength": _Told(
        "B01 B02 C10 P30",
        "QEMU and libvhost-user break the device, packed crosvm and SPDK refuse; vhost, rust-vmm, Firecracker, DPDK "
        "and OpenVMM accept. Copy loops without end came of it in vringh (CVE-2023-5158) and QEMU (CVE-2016-6490).",
        *_TOLERATED,
        "no clause forbids it, and drivers that are served by vhost, rust-vmm or DPDK may rely on it",
    ),
    "UnmappedAddress": _Told(
        "B03 B06 B08 B10 B14",
        "Most give an error; QEMU also takes addresses of devices, through a bounce buffer (CVE-2024-3446, "
        "CVE-2024-8612); DPDK once looked only at the first byte (CVE-2018-1059).",
    ),
    "AddressWraps": _Told(
        "B04",
        "vringh has an error of its own for it; OpenVMM once added without a check.",
    ),
    "ReadOnlyAddress": _Told("B15", ""),
    "IndirectNotNegotiated": _Told(
        "I01",
        "QEMU, libvhost-user, vhost, vringh, rust-vmm and DPDK follow the table all the same; crosvm gives an error; "
        "Firecracker and OpenVMM take the table for data.",
    ),
    "IndirectAndNext": _Told(
        "I02 I05 P15",
        "QEMU, libvhost-user, rust-vmm and OpenVMM ignore NEXT; vhost, vringh and packed DPDK go on behind the table; "
        "QEMU's packed ring came into a loop without end by it (CVE-2026-16457).",
    ),
    "IndirectAfterDirect": _Told("P15", "DPDK goes on; crosvm gives an error."),
    "NestedIndirect": _Told(
        "I03 P14",
        "QEMU, libvhost-user and DPDK take the entry for data; vhost, vringh and OpenVMM give an error; rust-vmm cuts "
        "the chain off. In a split table interop refuses it too.",
        *_TOLERATED,
        "in a packed table 2.8.7 reserves the flag, and QEMU ignores it",
    ),
    "IndirectBadLen": _Told(
        "I06 I07 P16",
        "QEMU, libvhost-user, vhost and vringh refuse a remainder; DPDK, SPDK and OpenVMM round down, which the clause "
        "allows. A table of 0 bytes aborted QEMU's packed ring until 2026.",
    ),
    "IndirectTooLong": _Told(
        "I08",
        "QEMU takes 1024 segments, vhost 65536 entries; OpenVMM cut the count to 16 bits; packed DPDK refuses even as "
        "many entries as the queue has. Beyond `max_indirect` (1024) interop refuses too.",
        *_TOLERATED,
        "drivers of Windows make chains of up to 515 descriptors whatever the size of the queue",
    ),
    "IndirectUnmapped": _Told("I11", "QEMU and libvhost-user break the device, vhost gives an error."),
    "UsedIdxTooFar": _Told(
        "G05 G06",
        "The Linux driver counts no used buffers and would go round for ever.",
        *_USED,
    ),
    "UsedIdOutOfRange": _Told(
        "G01",
        "Linux breaks the queue; the split ring of Windows drivers has no check and indexes with it; virtio-drivers "
        "cuts it to 16 bits.",
        *_USED,
    ),
    "UsedIdNotInFlight": _Told(
        "G02 G08 G11",
        "Linux breaks the queue, as Windows drivers do for packed rings; in their split ring it is an assertion only.",
        *_USED,
    ),
    "UsedLenTooBig": _Told(
        "G04",
        "Linux 6.0 does not look; virtio-drivers does only in its owning queue; a user-space driver panicked.",
        *_USED,
    ),
}

RING_ENTRIES: Final = tuple(
    Entry(
        name=rule.name,
        family="virtio",
        clauses=tuple(rule.clause.split(", ")),
        summary=rule.summary,
        interop=told.interop,
        strict=told.strict,
        practice=told.practice,
        peer=told.peer,
        rows=tuple(told.rows.split()),
    )
    for rule in rules()
    if (told := _TOLD.get(rule.name)) is not None
)
"""One entry for each rule of `rules()`, in its order."""
