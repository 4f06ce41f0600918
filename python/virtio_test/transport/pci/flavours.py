"""`declare`: what a device looks like on PCI, in each of its flavours.

Theory
------
The three flavours are those of the device that this project began with, and of QEMU:

* ``transitional``: legacy registers in I/O BAR 0 beside the modern ones; revision 0, a device id from 0x1000 to
  0x103f, and the virtio id as subsystem id (4.1.2.3);
* ``non-transitional``: modern only; device id 0x1040 plus the virtio id, revision 1, subsystem id 0x40 or above;
* ``generic``: transitional on a root bus, non-transitional behind a PCI Express port, where there may be no I/O
  space, and for a device that has no legacy form.

The four virtio structures share BAR 4, 64 bits wide and prefetchable, each on a page of its own; MSI-X is in BAR 1.
That is where SeaBIOS, Linux and QEMU are used to finding them. Shared memory regions lie in BAR 2.

A function behind an Express port is an Express endpoint; elsewhere it is a conventional function, unless `express`
asks for an endpoint integrated into the root complex. Either way it can be reset alone (FLR).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final, Literal, TypeAlias

from virtio_test.device import Device
from virtio_test.errors import InvalidArgument
from virtio_test.spec.ids import (
    PCI_MODERN_DEVICE_ID_BASE,
    PCI_MODERN_MIN_REVISION,
    PCI_TEST_DEVICE_ID,
    PCI_TRANSITIONAL_IDS,
    PCI_TRANSITIONAL_REVISION,
    PCI_VENDOR_ID,
    TEST_DEVICE_ID,
    DeviceId,
)
from virtio_test.spec.pci import COMMON_SIZE, MSIX_MAX_VECTORS, CapType

from .capabilities import (
    AdvancedFeatures,
    Capability,
    Express,
    Msix,
    Notify,
    PciCfg,
    Power,
    SharedMemory,
    VendorData,
    Virtio,
)
from .declaration import Declaration, Ids, Layout, Place
from .interface import Bar
from .legacy import HEADER_MSIX

__all__ = ["CLASSES", "PCI_CLASS_MEMORY_RAM", "PCI_CLASS_OTHERS", "TRANSITIONAL_IDS", "Flavour", "class_of", "declare"]

Flavour: TypeAlias = Literal["generic", "transitional", "non-transitional"]

PCI_CLASS_OTHERS: Final = 0x00FF
PCI_CLASS_MEMORY_RAM: Final = 0x0500

CLASSES: Final[Mapping[int, int]] = MappingProxyType(
    {DeviceId.NET: 0x0200, DeviceId.BLOCK: 0x0100, DeviceId.CONSOLE: 0x0780, DeviceId.SCSI: 0x0100}
)
"""Virtio id → base class and subclass, where it is not `PCI_CLASS_OTHERS`."""

TRANSITIONAL_IDS: Final[Mapping[int, int]] = MappingProxyType(
    {TEST_DEVICE_ID: PCI_TEST_DEVICE_ID, **{int(key): value for key, value in PCI_TRANSITIONAL_IDS.items()}}
)
"""Virtio id → transitional PCI device id: the table of 4.1.2.1, and the test device's default."""

_PAGE: Final = 4096
_MODERN_BAR: Final = 4
_MSIX_BAR: Final = 1
_SHARED_BAR: Final = 2
_INTEGRATED: Final = 9


def class_of(value: int) -> int:
    """The class property as the original reads it: memory, or else the one without a class."""
    return value if value == PCI_CLASS_MEMORY_RAM else PCI_CLASS_OTHERS


def declare(
    device: Device,
    *,
    flavour: Flavour = "generic",
    behind_express_port: bool = False,
    express: bool | None = None,
    vectors: int | None = None,
    multiplier: int = 4,
    wide: bool = True,
    pci_vendor: int = PCI_VENDOR_ID,
    pci_device: int | None = None,
    revision: int | None = None,
    pci_class: int | None = None,
    subsystem_vendor: int = PCI_VENDOR_ID,
    subsystem: int | None = None,
    pin: int = 1,
    shared_memory: Mapping[int, int] = MappingProxyType({}),
    vendor_data: Sequence[VendorData] = (),
    admin_queues: int = 0,
) -> Declaration:
    """What `device` looks like on PCI.

    Args:
        device: the device.
        flavour: see above.
        behind_express_port: whether it sits behind a PCI Express port.
        express: whether it is a PCI Express function; as its place says when None, never when transitional.
        vectors: entries of the MSI-X table, 0 for no MSI-X; one per queue and one more, at least 2, when None.
        multiplier: bytes between two queues' notification places; 0 for one place, 4096 for a page each.
        wide: BAR 4 is 64 bits wide and prefetchable; else 32 bits.
        pci_vendor: PCI vendor id.
        pci_device: PCI device id; as the flavour says when None.
        revision: as the flavour says when None.
        pci_class: 16 bits; of `CLASSES`, or else `PCI_CLASS_OTHERS`, when None.
        subsystem_vendor: subsystem vendor id.
        subsystem: subsystem id; as the flavour says when None.
        pin: interrupt pin, 0 for none.
        shared_memory: region id → bytes.
        vendor_data: vendor data capabilities.
        admin_queues: how many of the device's queues, the last ones, are administration virtqueues.

    Raises:
        InvalidArgument: the device has no such flavour, or a number that cannot be.
    """
    transitional = _is_transitional(device, flavour, behind_express_port=behind_express_port, given=pci_device)
    is_express = (behind_express_port if express is None else express) and not transitional
    queues = len(device.queue_sizes)
    if not 0 <= admin_queues <= queues:
        raise InvalidArgument(f"{admin_queues} administration virtqueues of a device with {queues} virtqueues")
    count = min(max(2, queues + 1), MSIX_MAX_VECTORS) if vectors is None else vectors
    if not 0 <= count <= MSIX_MAX_VECTORS:
        raise InvalidArgument(f"{count} vectors: MSI-X has at most {MSIX_MAX_VECTORS}")
    pci_id = _device_id(device, transitional=transitional) if pci_device is None else pci_device
    ids = Ids(
        pci_vendor,
        pci_id,
        (PCI_TRANSITIONAL_REVISION if transitional else PCI_MODERN_MIN_REVISION) if revision is None else revision,
        (CLASSES.get(device.device_id, PCI_CLASS_OTHERS) if pci_class is None else pci_class) << 8,
        subsystem_vendor,
        (device.device_id if transitional else pci_id) if subsystem is None else subsystem,
    )
    limits = (0xFFFF, 0xFFFF, 0xFF, 0xFF_FFFF, 0xFFFF, 0xFFFF)
    for name, value, limit in zip(ids._fields, ids, limits, strict=True):
        if not 0 <= value <= limit:
            raise InvalidArgument(f"the PCI {name} is {value:#x}; it is at most {limit:#x}")
    layout, bars = _layout(device, count, multiplier, admin_queues, shared_memory, transitional=transitional, wide=wide)
    return Declaration(
        ids=ids,
        bars=bars,
        layout=layout,
        capabilities=_capabilities(layout, vendor_data, express=is_express, integrated=not behind_express_port),
        extended_space=is_express,
        pin=pin,
    )


def _is_transitional(device: Device, flavour: Flavour, *, behind_express_port: bool, given: int | None) -> bool:
    known = given is not None or device.device_id in TRANSITIONAL_IDS
    if flavour == "generic":
        return device.transitional and known and not behind_express_port
    if flavour not in ("transitional", "non-transitional"):
        raise InvalidArgument(f"flavour {flavour!r}: say generic, transitional or non-transitional")
    if flavour == "transitional" and not device.transitional:
        raise InvalidArgument("the device cannot be driven by the legacy rules, so it has no transitional flavour")
    if flavour == "transitional" and not known:
        message = f"virtio id {device.device_id} has no transitional PCI device id: give one from 0x1000 to 0x103f"
        raise InvalidArgument(message)
    return flavour == "transitional"


def _device_id(device: Device, *, transitional: bool) -> int:
    return TRANSITIONAL_IDS[device.device_id] if transitional else PCI_MODERN_DEVICE_ID_BASE + device.device_id


def _layout(
    device: Device,
    vectors: int,
    multiplier: int,
    admin_queues: int,
    shared_memory: Mapping[int, int],
    *,
    transitional: bool,
    wide: bool,
) -> tuple[Layout, tuple[Bar, ...]]:
    size = device.config.size
    pages = max(1, _pages(size))
    # Each place takes 4 bytes at most; with a multiplier of 0 there is one place.
    last = max(0, len(device.queue_sizes) - 1) * multiplier
    notify = Place(_MODERN_BAR, (2 + pages) * _PAGE, last + 4)
    end = notify.offset + _pages(notify.length) * _PAGE
    bars = [Bar(_MODERN_BAR, _power_of_two(end), "memory64" if wide else "memory32", wide)]
    table = pba = legacy = None
    if vectors:
        bits = _power_of_two(max(16 * vectors, _PAGE // 2))
        table = Place(_MSIX_BAR, 0, 16 * vectors)
        pba = Place(_MSIX_BAR, bits, (vectors + 63) // 64 * 8)
        bars.append(Bar(_MSIX_BAR, _power_of_two(max(_PAGE, pba.offset + pba.length))))
    if transitional:
        # An I/O BAR has 256 bytes at most: a legacy driver sees no more of a longer configuration space.
        legacy = Place(0, 0, min(256, _power_of_two(max(32, HEADER_MSIX + size))))
        bars.append(Bar(0, legacy.length, "io"))
    shared: dict[int, Place] = {}
    at = 0
    for key, length in shared_memory.items():
        shared[key] = Place(_SHARED_BAR, at, length)
        at += _pages(length) * _PAGE
    if at:
        bars.append(Bar(_SHARED_BAR, _power_of_two(at), "memory64", prefetchable=True))
    layout = Layout(
        common=Place(_MODERN_BAR, 0, COMMON_SIZE),
        isr=Place(_MODERN_BAR, _PAGE, 4),
        config=Place(_MODERN_BAR, 2 * _PAGE, size) if size else None,
        notify=notify,
        multiplier=multiplier,
        vectors=vectors,
        table=table,
        pba=pba,
        legacy=legacy,
        shared=shared,
        admin_queues=admin_queues,
    )
    return layout, tuple(sorted(bars))


def _capabilities(
    layout: Layout, vendor_data: Sequence[VendorData], *, express: bool, integrated: bool
) -> dict[str, Capability]:
    made: dict[str, Capability] = {}
    if layout.table is not None and layout.pba is not None:
        made["msix"] = Msix(layout.vectors, layout.table.bar, layout.table.offset, layout.pba.bar, layout.pba.offset)
    made["common"] = Virtio(CapType.COMMON_CFG, *layout.common)
    made["isr"] = Virtio(CapType.ISR_CFG, *layout.isr)
    if layout.config is not None:
        made["device"] = Virtio(CapType.DEVICE_CFG, *layout.config)
    place = layout.notify
    made["notify"] = Notify(bar=place.bar, offset=place.offset, length=place.length, multiplier=layout.multiplier)
    for key, place in layout.shared.items():
        made[f"shared{key}"] = SharedMemory(bar=place.bar, offset=place.offset, length=place.length, id=key)
    made["pci_cfg"] = PciCfg()
    for at, each in enumerate(vendor_data):
        made[f"vendor{at}"] = each
    made["power"] = Power()
    if express:
        made["express"] = Express(_INTEGRATED if integrated else 0)
    else:
        made["reset"] = AdvancedFeatures()
    return made


def _pages(size: int) -> int:
    return -(-size // _PAGE)


def _power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()
