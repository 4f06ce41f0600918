"""PCI functions in a guest: finding them, binding drivers to one of them, and what lspci must say of a declaration."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence

from virtio_test.transport.pci.capabilities import (
    AdvancedFeatures,
    Capability,
    Express,
    Msix,
    Notify,
    Power,
    SharedMemory,
    VendorData,
    Virtio,
)
from virtio_test.transport.pci.declaration import Declaration

from tests.kernel.checks import shell
from tests.kernel.console import GuestError
from tests.kernel.guest import Guest

_STRUCTURES = {1: "CommonCfg", 2: "Notify", 3: "ISR", 4: "DeviceCfg"}
_FIRST_CAPABILITY = 0x40


def virtio_name(guest: Guest, slot: str) -> str:
    """The virtio device on a function, such as ``virtio3``; it changes when virtio-pci is bound again.

    Raises:
        GuestError: there is not one.
    """
    names = shell(guest, f"cd /sys/bus/pci/devices/{slot}; ls -d virtio*")
    if len(names) != 1:
        raise GuestError(f"{slot} has the virtio devices {names}")
    return names[0]


@contextlib.contextmanager
def bound(guest: Guest, slot: str, driver: str = "virtio_test") -> Generator[str]:
    """A driver bound to the virtio device of a function alone; gives that device's name."""
    name = virtio_name(guest, slot)
    guest.command(f"write /sys/bus/virtio/drivers/{driver}/bind {name}")
    yield name
    guest.command(f"write /sys/bus/virtio/drivers/{driver}/unbind {name}")


def interrupts(guest: Guest, name: str) -> list[str]:
    """The lines of /proc/interrupts of one virtio device."""
    return [line for line in shell(guest, "cat /proc/interrupts") if f"{name}-" in line or line.endswith(name)]


def declared(declaration: Declaration) -> list[str]:
    """What lspci must say of a function, in order, each line without its indentation."""
    ids = declaration.ids
    revision = f" (rev {ids.revision:02x})" if ids.revision else ""
    lines = [f"Class {ids.class_code >> 8:04x}: Device {ids.vendor:04x}:{ids.device:04x}{revision}"]
    lines.append(f"Subsystem: Device {ids.subsystem_vendor:04x}:{ids.subsystem:04x}")
    for bar in declaration.bars:
        width = {"io": "I/O ports", "memory32": "(32-bit,", "memory64": "(64-bit,"}[bar.kind]
        kind = width if bar.kind == "io" else f"{width} {'' if bar.prefetchable else 'non-'}prefetchable)"
        lines += [f"Region {bar.index}: ", kind, f"[size={_size(bar.size)}]"]
    at = _FIRST_CAPABILITY
    for capability in declaration.capabilities.values():
        lines += [f"Capabilities: [{at:x}] ", *_capability(capability)]
        at = (at + 2 + len(capability.body()) + 3) & ~3
    return lines


def missing(text: str, wanted: Sequence[str]) -> str | None:
    """The first of the pieces that does not come in `text` behind those before it."""
    at = 0
    for piece in wanted:
        found = text.find(piece, at)
        if found < 0:
            return piece
        at = found + len(piece)
    return None


def _size(size: int) -> str:
    return f"{size >> 10}K" if size >= 1 << 10 else str(size)


def _capability(capability: Capability) -> list[str]:
    match capability:
        case Msix():
            return [
                f"MSI-X: Enable- Count={capability.vectors} Masked-",
                f"Vector table: BAR={capability.table_bar} offset={capability.table:08x}",
                f"PBA: BAR={capability.pba_bar} offset={capability.pba:08x}",
            ]
        case SharedMemory():
            where = f"BAR={capability.bar} offset={capability.offset:016x} size={capability.length:016x}"
            return ["Vendor Specific Information: VirtIO: SharedMemory", f"{where} id={capability.id}"]
        case Virtio():
            name = _STRUCTURES.get(capability.cfg_type, "<unknown>")
            multiplier = [f" multiplier={capability.multiplier:08x}"] if isinstance(capability, Notify) else []
            return [f"Vendor Specific Information: VirtIO: {name}", *_place(capability), *multiplier]
        case VendorData():
            # lspci takes every vendor's data behind this vendor id for a structure of virtio's.
            return ["Vendor Specific Information: VirtIO: <unknown>"]
        case Power():
            return ["Power Management version 3", f"Status: D0 NoSoftRst{'+' if capability.no_soft_reset else '-'}"]
        case AdvancedFeatures():
            return ["PCI Advanced Features", "AFCap: TP+ FLR+"]
        case Express():
            kind = {0: "Endpoint", 1: "Legacy Endpoint", 9: "Root Complex Integrated Endpoint"}[capability.port_type]
            return [f"Express (v2) {kind}", f"FLReset{'+' if capability.flr else '-'}"]
        case _:
            raise GuestError(f"no words for {capability}")


def _place(capability: Virtio) -> list[str]:
    return [f"BAR={capability.bar} offset={capability.offset:08x} size={capability.length:08x}"]
