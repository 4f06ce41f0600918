"""`VirtioMmio`: a device behind the registers of virtio-mmio, version 2 or the legacy version 1 (VIRTIO 1.4, 4.2).

Theory
------
One page of memory and one interrupt line. The control registers fill its first 256 bytes and are 32 bits wide;
behind them lies the configuration space. What the registers mean is `RegisterBank`; here stands where they lie,
as rows of (name, offset, access, handlers), one table for each version.

**Nothing a driver does raises.** An access of another width, to a place without a register or in a direction that
the register does not have reads as 0 or changes nothing; it is noted in the bank, with its clause. So is an access
to the configuration space that is not as wide as the field, but that one is served.

**The interrupt** is a level: asserted while InterruptStatus is not 0, from the event until the driver acknowledges
its bit. `interrupt` is called when the level changes.

**Wrong on purpose**: `registers` says what a register reads instead, `writes` what becomes of a value written. Both
stand between the driver and the honest device, which knows nothing about it.

**Saved state**: `save` and `restore`; see `saved` for what is not of this page alone.

A legacy driver says GuestPageSize once, before it resets the device for the first time: a reset keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from virtio_test._core import GuestMemory, Policy
from virtio_test.console import shown
from virtio_test.device import Device
from virtio_test.errors import InvalidArgument, QueueViolation, SavedStateError, StatusViolation
from virtio_test.features import FeatureSet
from virtio_test.loop import OwnerLoop
from virtio_test.spec.mmio import (
    CONFIG,
    INTERRUPT_CONFIG,
    INTERRUPT_DEFINED,
    INTERRUPT_QUEUE,
    LEGACY_REGISTERS,
    MAGIC,
    NO_SHARED_MEMORY,
    REGISTERS,
    VERSION,
    VERSION_LEGACY,
)

from . import saved
from .bank import RegisterBank
from .slot import Area, QueueSlot

__all__ = ["LEGACY", "MODERN", "PAGE", "Override", "Row", "SharedRegion", "VirtioMmio", "WriteOverride"]

PAGE: Final = 0x1000
"""Bytes that the device takes in the address space."""

DEFAULT_VENDOR_ID: Final = 0x1AF4
_WORD: Final = 0xFFFF_FFFF
_DEFAULT_ALIGN: Final = 4096
_STATE_VERSION: Final = 1
_STATE_FIELDS: Final = (
    "page_version",
    "queue_sel",
    "shm_sel",
    "device_features_sel",
    "driver_features_sel",
    "interrupt_status",
    "guest_page_size",
    "aligns",
    "pages",
)

Override = int | Callable[[int], int]
"""What a register reads: a number, or a function of the number that it would read."""

WriteOverride = Callable[[int], int | None]
"""What a write to a register becomes: another number, or None for nothing at all."""

SharedRegion = tuple[int, int]
"""Guest address and bytes of a shared memory region (VIRTIO 1.4, 2.10)."""


@dataclass(frozen=True, slots=True)
class Row:
    """One register.

    Attributes:
        name: as the specification has it.
        read: what it reads, 32 bits; None where it cannot be read.
        write: what a write does; None where it cannot be written.
    """

    name: str
    read: Callable[[VirtioMmio], int] | None = None
    write: Callable[[VirtioMmio, int], object] | None = None


class VirtioMmio:
    """One device behind virtio-mmio registers.

    Args:
        device: the device; it is attached at once.
        version: 2, or 1 for the legacy interface.
        vendor_id: what VendorID reads.
        registers: what registers read instead of the truth, by name.
        writes: what becomes of writes to registers, by name.
        shared_memory: shared memory regions by id, each (guest address, bytes); version 2 only.
        loop: the owner loop; one with a `VirtualClock` that it moves itself, when None.
        memory: the guest memory; 16 MiB at address 0, when None.
        offered: what to offer of the device's features and of the transport's; all of the device's when None.
        policy: tolerances towards the driver.

    Attributes:
        bank: what is behind the registers.
        interrupt: called with the new level of the interrupt line, in the loop.

    Raises:
        InvalidArgument: an unknown version or register, an id or region that does not fit its register, an offer that
            cannot be, or version 1 of a device without legacy rules.
    """

    def __init__(
        self,
        device: Device,
        *,
        version: Literal[1, 2] = 2,
        vendor_id: int = DEFAULT_VENDOR_ID,
        registers: Mapping[str, Override] = MappingProxyType({}),
        writes: Mapping[str, WriteOverride] = MappingProxyType({}),
        shared_memory: Mapping[int, SharedRegion] = MappingProxyType({}),
        loop: OwnerLoop | None = None,
        memory: GuestMemory | None = None,
        offered: FeatureSet | None = None,
        policy: Policy = Policy.interop,
    ) -> None:
        if version not in (VERSION, VERSION_LEGACY):
            raise InvalidArgument(f"version is {version!r}; virtio-mmio has version 2 and the legacy version 1")
        if version == VERSION_LEGACY and not device.transitional:
            raise InvalidArgument("version 1 is the legacy interface, and this device has no legacy rules")
        if offered is not None and "NOTIF_CONFIG_DATA" in offered:
            raise InvalidArgument("NOTIF_CONFIG_DATA cannot be offered: virtio-mmio has no register for its value")
        rows = MODERN if version == VERSION else LEGACY
        for name in (*registers, *writes):
            if name not in {row.name for row in rows.values()}:
                raise InvalidArgument(f"virtio-mmio version {version} has no register {name!r}")
        for number, (base, size) in shared_memory.items():
            if version == VERSION_LEGACY:
                raise InvalidArgument("the legacy interface has no shared memory regions")
            if not 0 <= number <= 0xFF or min(base, size) < 0 or base + size >= NO_SHARED_MEMORY:
                raise InvalidArgument(f"shared memory region {number} of {size} bytes at {base:#x} cannot be")
        if not 0 <= vendor_id <= _WORD:
            raise InvalidArgument(f"vendor id {vendor_id:#x} does not fit 32 bits")
        self.version = version
        self.vendor_id = vendor_id
        self.registers = dict(registers)
        self.writes = dict(writes)
        self.shared_memory = dict(shared_memory)
        self.interrupt: Callable[[bool], object] = lambda _: None
        self.guest_page_size = 0
        self._rows = rows
        self._asserted = False
        self._forget()
        self.bank = RegisterBank(device, loop=loop, memory=memory, offered=offered, policy=policy, transport="mmio")
        self.bank.on_call = lambda _: self._event(INTERRUPT_QUEUE)
        self.bank.on_config = lambda: self._event(INTERRUPT_CONFIG)
        self.bank.on_reset = self._reset

    def __repr__(self) -> str:
        return f"<VirtioMmio version {self.version} of {self.device!r}, status {self.bank.status}>"

    @property
    def device(self) -> Device:
        """The device behind the registers."""
        return self.bank.device

    @property
    def loop(self) -> OwnerLoop:
        """The owner loop."""
        return self.bank.loop

    @property
    def memory(self) -> GuestMemory:
        """The guest memory."""
        return self.bank.memory

    @property
    def errors(self) -> list[Exception]:
        """What the driver did against the rules, the first thousand."""
        return self.bank.errors

    @property
    def legacy(self) -> bool:
        """Whether this is version 1."""
        return self.version == VERSION_LEGACY

    @property
    def asserted(self) -> bool:
        """The level of the interrupt line."""
        return self._asserted

    # --- accesses -------------------------------------------------------------------------------------------

    def read(self, offset: int, length: int) -> bytes:
        """The driver reads `length` bytes at `offset` of the page, in one access.

        Raises:
            InvalidArgument: not an access to this page.
        """
        self._check(offset, length)
        if offset >= CONFIG:
            return self._read_config(offset - CONFIG, length)
        row = self._row("read", offset, length)
        if row is None:
            return bytes(length)
        if row.read is None:
            self._note("WriteOnlyRegister", "4.2.2.2", f"{row.name} read, which can only be written")
            value = 0
        else:
            value = row.read(self)
        override = self.registers.get(row.name, value)
        value = override if isinstance(override, int) else override(value)
        return (value & _WORD).to_bytes(4, "little")

    def write(self, offset: int, data: bytes) -> None:
        """The driver writes `data` at `offset` of the page, in one access.

        Raises:
            InvalidArgument: not an access to this page.
        """
        self._check(offset, len(data))
        if offset >= CONFIG:
            self._write_config(offset - CONFIG, data)
            return
        row = self._row("write", offset, len(data))
        if row is None:
            return
        value: int | None = int.from_bytes(data, "little")
        if row.name in self.writes:
            value = self.writes[row.name](int.from_bytes(data, "little"))
        if value is None:
            return
        if row.write is None:
            self._note("ReadOnlyRegister", "4.2.2.2", f"{row.name} written, which can only be read")
            return
        # A reset belongs to no interface, and a legacy driver names its page size before anything else.
        if row.name != "GuestPageSize" and (row.name, value) != ("Status", 0):
            self.bank.claim("legacy" if self.legacy else "modern")
        row.write(self, value & _WORD)

    @staticmethod
    def _check(offset: int, length: int) -> None:
        if offset < 0 or length < 1 or offset + length > PAGE:
            raise InvalidArgument(f"{length} bytes at offset {offset:#x} are no access to a page of {PAGE} bytes")

    def _row(self, verb: str, offset: int, length: int) -> Row | None:
        if length != 4 or offset % 4:
            self._note("RegisterWidth", "4.2.2.2", f"{verb} of {length} bytes at {offset:#x}, control registers have 4")
            return None
        row = self._rows.get(offset)
        if row is None:
            self._note("NoSuchRegister", "4.2.2.2", f"{verb} at {offset:#x}, where version {self.version} has none")
        return row

    def _note(self, rule: str, clause: str, message: str) -> None:
        self.bank.note(StatusViolation(rule, clause, message))

    def _note_queue(self, rule: str, clause: str, message: str) -> None:
        self.bank.note(QueueViolation(rule, clause, message, queue=self.queue_sel))

    # --- configuration space --------------------------------------------------------------------------------

    def _config_part(self, verb: str, offset: int, length: int) -> int:
        """How many of the bytes exist, where the access may be at all."""
        if length not in (1, 2, 4) or offset % length:
            message = f"{verb} of {length} bytes at offset {offset} of the configuration space"
            self._note("ConfigAccess", "4.2.2.2", f"{message}: 1, 2 or 4 bytes, aligned")
            return 0
        size = self.bank.config_size()
        part = max(0, min(length, size - offset))
        if part < length:
            message = f"{verb} of {length} bytes at offset {offset}, the configuration space has {size}"
            self._note("ConfigOutOfRange", "2.5", message)
        elif not self.legacy:
            for field in self.device.config.layout.overlapping(offset, length):
                width = min(field.size, 4) if field.is_integer else 1
                if length != width or (offset - field.offset) % width:
                    message = f"{verb} of {length} bytes at offset {offset}: {field.name} is a {field.type}"
                    self._note("ConfigAccessWidth", "4.2.2.2", message)
                    break
        return part

    def _read_config(self, offset: int, length: int) -> bytes:
        part = self._config_part("read", offset, length)
        return (self.bank.read_config(offset, part) if part else b"").ljust(length, b"\0")

    def _write_config(self, offset: int, data: bytes) -> None:
        part = self._config_part("write", offset, len(data))
        if part:
            self.bank.claim("legacy" if self.legacy else "modern")
            self.bank.write_config(offset, data[:part])

    # --- interrupt and reset --------------------------------------------------------------------------------

    def _event(self, bit: int) -> None:
        self.interrupt_status |= bit
        self._drive()

    def acknowledge(self, bits: int) -> None:
        """The driver has handled these events (InterruptACK)."""
        if bits & ~INTERRUPT_DEFINED:
            self._note("UndefinedAckBits", "4.2.2.2", f"InterruptACK = {bits:#x}, defined are {INTERRUPT_DEFINED:#x}")
        self.interrupt_status &= ~bits
        self._drive()

    def _drive(self) -> None:
        asserted = self.interrupt_status != 0
        if asserted != self._asserted:
            self._asserted = asserted
            self.interrupt(asserted)

    def _forget(self) -> None:
        """Every register of our own as after a reset."""
        self.interrupt_status = 0
        self.queue_sel = 0
        self.shm_sel = 0
        self.device_features_sel: int | None = None
        self.driver_features_sel: int | None = None
        self.aligns: dict[int, int] = {}
        self.pages: dict[int, int] = {}

    def _reset(self) -> None:
        self._forget()
        self._drive()

    # --- saved state ----------------------------------------------------------------------------------------

    def save(self) -> dict[str, object]:
        """Device, queues and the page's registers as JSON values; everything goes on afterwards."""
        bank = saved.save(self.bank)
        indices = range(len(self.bank.slots))
        values = {
            "page_version": self.version,
            **{name: getattr(self, name) for name in _STATE_FIELDS[1:7]},
            "aligns": [self.aligns.get(index, 0) for index in indices],
            "pages": [self.pages.get(index, 0) for index in indices],
        }
        return {"version": _STATE_VERSION, "bank": bank, "page": values}

    def restore(self, state: Mapping[str, object], *, device: Device | None = None) -> None:
        """Take over what `save` gave, around `device` if one is given.

        Raises:
            SavedStateError: the state is malformed or does not fit; nothing was changed.
        """
        target = self.device if device is None else device
        parts = saved.fields(state, "state of an MMIO page", ("version", "bank", "page"))
        saved.version(parts["version"], _STATE_VERSION)
        page = saved.fields(parts["page"], "MMIO page", _STATE_FIELDS)
        if page["page_version"] != self.version:
            raise SavedStateError(f"the saved page has version {shown(page['page_version'])}, this one {self.version}")
        selects = {
            name: None if page[name] is None else saved.number(page[name], name, _WORD)
            for name in ("device_features_sel", "driver_features_sel")
        }
        plain = {name: saved.number(page[name], name, _WORD) for name in ("queue_sel", "shm_sel", "guest_page_size")}
        events = saved.number(page["interrupt_status"], "interrupt status", INTERRUPT_DEFINED)
        count = len(target.queue_sizes)
        aligns, pages = (saved.numbers(page[name], name, _WORD, count=count) for name in ("aligns", "pages"))
        if any(value & (value - 1) for value in (*aligns, plain["guest_page_size"])):
            raise SavedStateError(f"a saved page size or alignment is no power of two: {aligns}, {plain}")
        interface = "legacy" if self.legacy else "modern"
        saved.restore(self.bank, saved.check(self.bank, parts["bank"], target, interfaces=(interface,)))
        for name, value in {**selects, **plain, "interrupt_status": events}.items():
            setattr(self, name, value)
        self.aligns = {index: value for index, value in enumerate(aligns) if value}
        self.pages = {index: value for index, value in enumerate(pages) if value}
        self._drive()

    # --- what the rows call ---------------------------------------------------------------------------------

    @property
    def slot(self) -> QueueSlot | None:
        """The virtqueue that QueueSel selects."""
        return self.bank.slot(self.queue_sel)

    def read_features(self) -> int:
        """DeviceFeatures."""
        select = self._selected("DeviceFeatures", self.device_features_sel)
        if self.legacy:
            return self.bank.legacy_features() if select == 0 else 0
        return self.bank.device_features(select)

    def write_features(self, value: int) -> None:
        """DriverFeatures."""
        select = self._selected("DriverFeatures", self.driver_features_sel)
        if not self.legacy or select == 0:
            self.bank.write_driver_features(select, value)
        elif value:
            self._note("FeatureNotOffered", "6.3", f"features word {select} = {value:#x}, a legacy device has word 0")

    def _selected(self, name: str, select: int | None) -> int:
        if select is None:
            self._note("SelectNotWritten", "4.2.2.2", f"{name} used before its selector was written")
        return select or 0

    def write_ready(self, value: int) -> None:
        """QueueReady."""
        if value == 1:
            self.bank.enable_queue(self.queue_sel)
        elif value == 0:
            self.bank.disable_queue(self.queue_sel)
        else:
            self._note_queue("BadQueueReady", "4.2.2", f"QueueReady = {value:#x}, which is neither 0 nor 1")

    def write_reset(self, value: int) -> None:
        """QueueReset: the queue is reset when the access is over, so the register always reads 0."""
        if value == 1:
            self.bank.reset_queue(self.queue_sel)
        else:
            self._note_queue("BadQueueReset", "4.2.2", f"QueueReset = {value:#x}, where only 1 means something")

    def notify(self, value: int) -> None:
        """QueueNotify: a queue index, with NOTIFICATION_DATA in its low 16 bits."""
        self.bank.kick(value & 0xFFFF if "NOTIFICATION_DATA" in self.bank.accepted else value)

    def write_page_size(self, value: int) -> None:
        """GuestPageSize."""
        if value == 0 or value & (value - 1):
            self._note("BadGuestPageSize", "4.2.4", f"GuestPageSize = {value:#x}, which is no power of two")
        else:
            self.guest_page_size = value

    def write_align(self, value: int) -> None:
        """QueueAlign (Q17)."""
        if value == 0 or value & (value - 1):
            self._note_queue("BadQueueAlign", "4.2.4", f"QueueAlign = {value:#x}, which is no power of two")
        elif self.slot is None:
            self._note_queue("NoSuchQueue", "4.2.4", f"QueueAlign written, but there are {len(self.bank.slots)} queues")
        elif self.slot.enabled:
            self._note_queue("EnabledQueueWritten", "4.2.4", "QueueAlign written while the queue is in use")
        else:
            self.aligns[self.queue_sel] = value

    def read_page(self) -> int:
        """QueuePFN."""
        slot = self.slot
        return self.pages.get(self.queue_sel, 0) if slot is not None and slot.enabled else 0

    def write_page(self, value: int) -> None:
        """QueuePFN."""
        if value and not self.guest_page_size:
            self._note_queue("NoGuestPageSize", "4.2.4", "QueuePFN written, and GuestPageSize never was")
            return
        # Nothing is kept for queues that do not exist: a driver can name four thousand million of them.
        if self.slot is not None and not self.slot.enabled:
            self.pages[self.queue_sel] = value
        align = self.aligns.get(self.queue_sel, _DEFAULT_ALIGN)
        self.bank.place_legacy_queue(self.queue_sel, value * self.guest_page_size, align=align)

    def shared(self) -> SharedRegion:
        """Address and size of the region that SHMSel selects."""
        return self.shared_memory.get(self.shm_sel, (NO_SHARED_MEMORY, NO_SHARED_MEMORY))


def _select(name: str) -> Callable[[VirtioMmio, int], None]:
    return lambda mmio, value: setattr(mmio, name, value)


def _address(area: Area, half: Literal["low", "high"]) -> Callable[[VirtioMmio, int], None]:
    return lambda mmio, value: mmio.bank.write_queue_address(mmio.queue_sel, area, value, half=half)


_COMMON: Final = (
    Row("MagicValue", lambda _: MAGIC),
    Row("Version", lambda mmio: mmio.version),
    Row("DeviceID", lambda mmio: mmio.device.device_id),
    Row("VendorID", lambda mmio: mmio.vendor_id),
    Row("QueueSel", write=_select("queue_sel")),
    Row("QueueSizeMax", lambda mmio: mmio.slot.max_size if mmio.slot is not None else 0),
    Row("QueueSize", write=lambda mmio, value: mmio.bank.write_queue_size(mmio.queue_sel, value)),
    Row("QueueNotify", write=lambda mmio, value: mmio.notify(value)),
    Row("InterruptStatus", lambda mmio: mmio.interrupt_status),
    Row("InterruptACK", write=lambda mmio, value: mmio.acknowledge(value)),
    Row("Status", lambda mmio: mmio.bank.read_status(), lambda mmio, value: mmio.bank.write_status(value)),
)
_MODERN: Final = (
    Row("DeviceFeatures", lambda mmio: mmio.read_features()),
    Row("DeviceFeaturesSel", write=_select("device_features_sel")),
    Row("DriverFeatures", write=lambda mmio, value: mmio.write_features(value)),
    Row("DriverFeaturesSel", write=_select("driver_features_sel")),
    Row(
        "QueueReady",
        lambda mmio: int(mmio.slot is not None and mmio.slot.enabled),
        lambda mmio, value: mmio.write_ready(value),
    ),
    Row("QueueDescLow", write=_address("desc", "low")),
    Row("QueueDescHigh", write=_address("desc", "high")),
    Row("QueueDriverLow", write=_address("driver", "low")),
    Row("QueueDriverHigh", write=_address("driver", "high")),
    Row("QueueDeviceLow", write=_address("device", "low")),
    Row("QueueDeviceHigh", write=_address("device", "high")),
    Row("SHMSel", write=_select("shm_sel")),
    Row("SHMLenLow", lambda mmio: mmio.shared()[1]),
    Row("SHMLenHigh", lambda mmio: mmio.shared()[1] >> 32),
    Row("SHMBaseLow", lambda mmio: mmio.shared()[0]),
    Row("SHMBaseHigh", lambda mmio: mmio.shared()[0] >> 32),
    Row("QueueReset", lambda _: 0, lambda mmio, value: mmio.write_reset(value)),
    Row("ConfigGeneration", lambda mmio: mmio.bank.config_generation()),
)
_LEGACY: Final = (
    Row("HostFeatures", lambda mmio: mmio.read_features()),
    Row("HostFeaturesSel", write=_select("device_features_sel")),
    Row("GuestFeatures", write=lambda mmio, value: mmio.write_features(value)),
    Row("GuestFeaturesSel", write=_select("driver_features_sel")),
    Row("GuestPageSize", write=lambda mmio, value: mmio.write_page_size(value)),
    Row("QueueAlign", write=lambda mmio, value: mmio.write_align(value)),
    Row("QueuePFN", lambda mmio: mmio.read_page(), lambda mmio, value: mmio.write_page(value)),
)

MODERN: Final[Mapping[int, Row]] = MappingProxyType({REGISTERS[row.name].offset: row for row in _COMMON + _MODERN})
"""The registers of version 2 by their byte offset."""

LEGACY: Final[Mapping[int, Row]] = MappingProxyType(
    {LEGACY_REGISTERS[row.name].offset: row for row in _COMMON + _LEGACY}
)
"""The registers of version 1 by their byte offset."""
