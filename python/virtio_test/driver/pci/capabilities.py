"""The capability list of a virtio function, read so that no device can lead the reader astray (VIRTIO 1.4, 4.1.4).

Theory
------
The list is a chain of bytes that the device chose. So every link is judged before it is followed (above the header,
aligned, not seen before), every capability before it is taken for what it says (it ends inside the space, it has the
bytes that its type needs), and every region before anybody reads there (in a BAR that exists, at least as long as
its structure, without wrap).

A capability that fails is left out, and the next of its type counts. Which ones were left out because the
specification says so (reserved type or BAR, a further one of the same type) is in `ignored`; what is wrong is a
finding. Only when a structure that a driver cannot do without is missing in the end, its first finding is raised.

A region that is longer than its BAR is cut to it, because a driver has to cope with unexpectedly large lengths
(4.1.4.1); it is a finding all the same.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, NamedTuple

from virtio_test.errors import StatusViolation
from virtio_test.spec import ids, pcibus
from virtio_test.spec.pci import (
    BARS,
    CAP64_SIZE,
    CAP_NOTIFY_SIZE,
    CAP_PCI_CFG_SIZE,
    CAP_SIZE,
    CAP_VENDOR,
    CapType,
)

from .probe import PciFunction

__all__ = ["Capabilities", "Ignored", "MsixCapability", "Structure", "VendorData", "walk"]

_VENDOR_LEAST: Final = 8
_END: Final = 1 << 64


class _Needs(NamedTuple):
    cap_len: int
    length: int
    align: int
    clause: str


_NEEDS: Final = {
    CapType.COMMON_CFG: _Needs(CAP_SIZE, 0x38, 4, "4.1.4.3.1"),
    CapType.NOTIFY_CFG: _Needs(CAP_NOTIFY_SIZE, 2, 2, "4.1.4.4.1"),
    CapType.ISR_CFG: _Needs(CAP_SIZE, 1, 1, "4.1.4.5.1"),
    CapType.DEVICE_CFG: _Needs(CAP_SIZE, 1, 4, "4.1.4.6.1"),
    CapType.PCI_CFG: _Needs(CAP_PCI_CFG_SIZE, 0, 1, "4.1.4.9.1"),
    CapType.SHARED_MEMORY_CFG: _Needs(CAP64_SIZE, 0, 1, "4.1.4.7.1"),
    CapType.VENDOR_CFG: _Needs(_VENDOR_LEAST, 0, 1, "4.1.4.8.1"),
}

_NAMES: Final = {
    CapType.COMMON_CFG: "Common",
    CapType.NOTIFY_CFG: "Notify",
    CapType.ISR_CFG: "Isr",
    CapType.PCI_CFG: "Window",
}


@dataclass(frozen=True, slots=True)
class Structure:
    """A region that a capability names, as far as it lies in its BAR.

    Attributes:
        type: what it is.
        position: the capability's place in the configuration space.
        bar: BAR index.
        offset: bytes from the start of the BAR.
        length: bytes.
        id: tells several of one type apart (shared memory).
        multiplier: bytes between two notification addresses (NOTIFY).
    """

    type: CapType
    position: int
    bar: int
    offset: int
    length: int
    id: int = 0
    multiplier: int = 0


class VendorData(NamedTuple):
    """A vendor data capability (4.1.4.8): of whom, and the bytes after the vendor id."""

    position: int
    vendor_id: int
    data: bytes


class Ignored(NamedTuple):
    """A capability that a driver has to leave out: where, of which type, and why."""

    position: int
    cfg_type: int
    why: str


class MsixCapability(NamedTuple):
    """What the MSI-X capability says: entries, and where table and pending bits lie."""

    position: int
    size: int
    table_bar: int
    table_offset: int
    pba_bar: int
    pba_offset: int


@dataclass(slots=True)
class Capabilities:
    """What was found.

    Attributes:
        structures: the first usable structure of each type; PCI_CFG has no region of its own.
        shared_memory: usable regions by their id.
        vendor: vendor data.
        msix: the MSI-X capability, not judged yet.
        ignored: what the specification says to ignore.
        broken: the first finding of each type.
    """

    structures: dict[CapType, Structure] = field(default_factory=dict[CapType, Structure])
    shared_memory: dict[int, Structure] = field(default_factory=dict[int, Structure])
    vendor: list[VendorData] = field(default_factory=list[VendorData])
    msix: MsixCapability | None = None
    ignored: list[Ignored] = field(default_factory=list[Ignored])
    broken: dict[CapType, StatusViolation] = field(default_factory=dict[CapType, StatusViolation])

    @property
    def virtio(self) -> bool:
        """Whether any virtio structure is there, usable or not; without one it is a legacy device (4.1.5.1.1.1)."""
        return bool(self.structures or self.shared_memory or self.vendor or self.ignored or self.broken)

    def missing(self, kind: CapType) -> StatusViolation | None:
        """What to say when the device has no usable structure of this type; None when it has one."""
        if kind in self.structures:
            return None
        if kind in self.broken:
            return self.broken[kind]
        others = [f"{each.why} at {each.position:#x}" for each in self.ignored if each.cfg_type == kind]
        text = f"no {kind.name} capability" + (f"; ignored: {', '.join(others)}" if others else "")
        return StatusViolation(f"Missing{_NAMES[kind]}", _NEEDS[kind].clause, text)

    def require(self, kind: CapType) -> Structure:
        """The structure of a type that a driver cannot do without.

        Raises:
            StatusViolation: what is wrong with the capabilities of this type, or that there is none.
        """
        problem = self.missing(kind)
        if problem is not None:
            raise problem
        return self.structures[kind]


def walk(function: PciFunction) -> Capabilities:
    """Read the whole list. At most 48 capabilities fit, so it always ends."""
    found = Capabilities()
    if not function.read("status") & pcibus.STATUS_CAPABILITIES:
        return found
    seen: set[int] = set()
    position, before = function.read("capabilities_pointer"), pcibus.HEADER["capabilities_pointer"][0]
    while position:
        problem = _judge_link(position, before, seen)
        if problem is not None:
            function.findings.note(problem)
            # One that leads into the header or back does so without its lowest bits too.
            position &= ~0x3
            if position in seen or position < pcibus.HEADER_SIZE:
                break
        seen.add(position)
        head = function.access.read_config(position, 4)
        if head & 0xFF == CAP_VENDOR:
            _take(function, found, position, head)
        elif head & 0xFF == pcibus.CAP_ID_MSIX and found.msix is None:
            found.msix = _msix(function, position, head)
        before, position = position, head >> 8 & 0xFF
    return found


def _judge_link(position: int, before: int, seen: set[int]) -> StatusViolation | None:
    where = f"the link at {before:#x} leads to {position:#x}"
    if position < pcibus.HEADER_SIZE:
        return StatusViolation("CapabilityBelowHeader", "4.1.1", f"{where}, inside the header")
    if position in seen:
        return StatusViolation("CapabilityLoop", "4.1.1", f"{where}, where the list has been before")
    if position & 0x3:
        return StatusViolation("CapabilityUnaligned", "4.1.1", f"{where}, no multiple of 4")
    return None


def _msix(function: PciFunction, position: int, head: int) -> MsixCapability | None:
    if position + pcibus.MSIX_CAP_SIZE > pcibus.CONFIG_SIZE:
        text = f"the MSI-X capability at {position:#x} ends outside of the configuration space"
        function.findings.note(StatusViolation("CapabilityBeyondSpace", "4.1.1", text))
        return None
    table = function.access.read_config(position + pcibus.MSIX_TABLE, 4)
    pba = function.access.read_config(position + pcibus.MSIX_PBA, 4)
    size = (head >> 16 & pcibus.MSIX_SIZE_MASK) + 1
    return MsixCapability(position, size, table & 0x7, table & ~0x7, pba & 0x7, pba & ~0x7)


def _take(function: PciFunction, found: Capabilities, position: int, head: int) -> None:
    """One vendor-specific capability: a structure, or a reason why not."""
    cap_len, cfg_type = head >> 16 & 0xFF, head >> 24 & 0xFF
    if cfg_type not in set(CapType):
        found.ignored.append(Ignored(position, cfg_type, "reserved type"))
        return
    kind = CapType(cfg_type)
    try:
        _take_known(function, found, position, kind, cap_len)
    except StatusViolation as problem:
        found.broken.setdefault(kind, problem)
        function.findings.note(problem)


def _take_known(function: PciFunction, found: Capabilities, position: int, kind: CapType, cap_len: int) -> None:
    needs = _NEEDS[kind]
    where = f"the {kind.name} capability at {position:#x}"
    if cap_len < needs.cap_len:
        text = f"{where} has cap_len {cap_len}, at least {needs.cap_len} are needed"
        raise StatusViolation("CapabilityTooShort", "4.1.4.2", text)
    if position + cap_len > pcibus.CONFIG_SIZE:
        raise StatusViolation("CapabilityBeyondSpace", "4.1.1", f"{where} ends at {position + cap_len:#x}")
    if kind is CapType.VENDOR_CFG:
        found.vendor.append(_vendor(function, position, cap_len, where))
        return
    words = [function.access.read_config(position + offset, 4) for offset in range(4, needs.cap_len, 4)]
    bar, number, offset, length = words[0] & 0xFF, words[0] >> 8 & 0xFF, words[1], words[2]
    if kind is CapType.PCI_CFG:
        # Its bar, offset and length are the driver's to write, and mean nothing before that (4.1.4.9).
        found.structures.setdefault(kind, Structure(kind, position, 0, 0, 0))
        return
    if bar not in BARS:
        found.ignored.append(Ignored(position, kind, f"reserved BAR {bar}"))
        return
    if kind is CapType.SHARED_MEMORY_CFG:
        place = Structure(kind, position, bar, offset | words[3] << 32, length | words[4] << 32, number)
        _take_shared_memory(function, found, place, where)
    elif kind in found.structures:
        found.ignored.append(Ignored(position, kind, "not the first of its type"))
    else:
        multiplier = words[3] if kind is CapType.NOTIFY_CFG else 0
        if multiplier & 1 or multiplier & (multiplier - 1):
            text = f"{where} has the multiplier {multiplier}; it is 0 or an even power of 2"
            raise StatusViolation("BadNotifyMultiplier", needs.clause, text)
        place = Structure(kind, position, bar, offset, length, number, multiplier)
        found.structures[kind] = _judge_region(function, place, needs, where)


def _judge_region(function: PciFunction, place: Structure, needs: _Needs, where: str) -> Structure:
    """The part of a region that can be used; at least what its type needs."""
    bar = function.bars.get(place.bar)
    if bar is None:
        raise StatusViolation(
            "NoSuchBar", "4.1.4", f"{where} lies in BAR {place.bar}, which the function does not have"
        )
    if place.offset % needs.align:
        raise StatusViolation(
            "RegionMisaligned", needs.clause, f"{where} has offset {place.offset:#x}, no multiple of {needs.align}"
        )
    if place.length < needs.length:
        text = f"{where} has a region of {place.length} bytes, at least {needs.length} are needed"
        raise StatusViolation("RegionTooShort", needs.clause, text)
    end = place.offset + place.length
    if end <= bar.size:
        return place
    rule = "RegionWraps" if end > 1 << 32 else "RegionBeyondBar"
    problem = StatusViolation(
        rule,
        "4.1.4",
        f"{where} reaches from {place.offset:#x} to {end:#x}, but BAR {place.bar} has {bar.size:#x} bytes",
    )
    if place.offset + needs.length > bar.size:
        raise problem
    function.findings.note(problem)
    return Structure(
        place.type, place.position, place.bar, place.offset, bar.size - place.offset, place.id, place.multiplier
    )


def _take_shared_memory(function: PciFunction, found: Capabilities, place: Structure, where: str) -> None:
    bar = function.bars.get(place.bar)
    if bar is None:
        raise StatusViolation(
            "NoSuchBar", "4.1.4", f"{where} lies in BAR {place.bar}, which the function does not have"
        )
    if bar.io:
        raise StatusViolation(
            "RegionInIoBar", "4.1.4.7.1", f"{where} lies in BAR {place.bar}, which is I/O, not memory"
        )
    end = place.offset + place.length
    if end > bar.size:
        rule = "RegionWraps" if end >= _END else "RegionBeyondBar"
        text = f"{where} reaches from {place.offset:#x} to {end:#x}, but BAR {place.bar} has {bar.size:#x} bytes"
        raise StatusViolation(rule, "4.1.4.7.1", text)
    if place.id in found.shared_memory:
        other = found.shared_memory[place.id].position
        text = f"{where} has the id {place.id}, as the one at {other:#x}"
        raise StatusViolation("DuplicateSharedMemory", "4.1.4.7.1", text)
    found.shared_memory[place.id] = place


def _vendor(function: PciFunction, position: int, cap_len: int, where: str) -> VendorData:
    data = b"".join(
        function.access.read_config(position + offset, 4).to_bytes(4, "little") for offset in range(4, cap_len & ~3, 4)
    )
    vendor_id = int.from_bytes(data[:2], "little")
    if cap_len % 4:
        raise StatusViolation("VendorDataSize", "4.1.4.8.1", f"{where} has {cap_len} bytes, no multiple of 4")
    if vendor_id == ids.PCI_VENDOR_ID:
        raise StatusViolation("VendorDataOfVirtio", "4.1.4.8.1", f"{where} is of vendor 0x1af4")
    return VendorData(position, vendor_id, data[2:])
