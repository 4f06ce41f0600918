"""`VirtioPci`: a virtio device as a PCI function.

Theory
------
The function is made from a `Declaration`. Configuration space is bytes and masks; the BARs hold structures. What a
write to configuration space sets in motion is done after it, in this order: the window of 4.1.4.9, the power state,
MSI-X, the command register, and last a reset of the function.

**Who may do what** (PCI 3.0, 6.2.2; PCI PM 1.2, 5.4): BARs answer while their decoding is enabled, memory is used and
messages are sent while the function is bus master, and all of it only in D0. Without bus mastering the queues are held,
and messages wait in their pending bits. The line needs neither. The window is configuration space: it always works.

**Resets.** Status 0 takes vectors, ISR status and pending bits; the MSI-X table stays. A reset of the function takes
everything, as power on.

**Saved state**: `save` and `restore`; see `transport.saved`, and `saved` for what is the function's.

Nothing that the driver does raises. What is not defined reads as ones, writes nothing, and is in `violations`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from virtio_test._core import GuestMemory, Policy
from virtio_test.device import Device
from virtio_test.errors import InvalidArgument, SavedStateError, StatusViolation
from virtio_test.features import FeatureSet
from virtio_test.loop import OwnerLoop
from virtio_test.spec.pci import LEGACY
from virtio_test.transport import saved
from virtio_test.transport.bank import RegisterBank

from .capabilities import (
    AF_CONTROL,
    EXPRESS_DEVICE_CONTROL,
    MSIX_CONTROL,
    POWER_CONTROL,
    AdvancedFeatures,
    Express,
    Msix,
    PciCfg,
    Power,
)
from .common import CommonRegisters
from .configspace import IO, MASTER, MEMORY, ConfigBytes
from .declaration import Declaration, Place
from .flavours import Flavour, declare
from .interface import Bar, InterruptSink
from .interrupts import Interrupts
from .legacy import LegacyRegisters
from .msix import PendingBits
from .regions import DeviceConfig, IsrStatus, Notifications, Ram, Region, find_region
from .saved import SavedFunction
from .window import Window

__all__ = ["VirtioPci"]

_STATE_VERSION: Final = 1
_LEGACY_NOTIFY: Final = (LEGACY["queue_notify"].offset, LEGACY["queue_notify"].size)


class VirtioPci:
    """One virtio device on PCI; a `PciEndpoint`.

    Args:
        device: the device.
        flavour: see `flavours`; counts without a declaration only.
        behind_express_port: whether it sits behind a PCI Express port; counts without a declaration only.
        declaration: what the function says about itself; of `declare`, when None.
        loop: the owner loop; one with a `VirtualClock` that it moves itself, when None.
        memory: the guest memory; 16 MiB at address 0, when None.
        offered: what of the device's features to offer; all when None.
        policy: tolerances towards the driver.

    Attributes:
        bank: what is behind the registers.
        declaration: what it was made from.
        interrupts: ISR status, vectors and line.
        shared: region id → shared memory, as bytes.

    Raises:
        InvalidArgument: a declaration that cannot be served: BARs or capabilities that do not fit.
    """

    def __init__(
        self,
        device: Device,
        *,
        flavour: Flavour = "generic",
        behind_express_port: bool = False,
        declaration: Declaration | None = None,
        loop: OwnerLoop | None = None,
        memory: GuestMemory | None = None,
        offered: FeatureSet | None = None,
        policy: Policy = Policy.interop,
    ) -> None:
        if declaration is None:
            declaration = declare(device, flavour=flavour, behind_express_port=behind_express_port)
        self.declaration = declaration
        self._config = ConfigBytes(declaration)
        self.bank = RegisterBank(device, loop=loop, memory=memory, offered=offered, policy=policy, transport="pci")
        layout = declaration.layout
        self.interrupts = Interrupts(
            self._config,
            queues=len(self.bank.slots),
            pin=declaration.pin != 0,
            awake=lambda: self.awake,
            bus_master=lambda: self.bus_master,
            vectors=layout.vectors,
        )
        self._common = CommonRegisters(self.bank, self.interrupts, declaration)
        self._legacy = LegacyRegisters(self.bank, self.interrupts, declaration)
        self.shared = {key: Ram(place.length) for key, place in layout.shared.items()}
        structures: list[tuple[Place | None, Region | None]] = [
            (layout.common, self._common),
            (layout.isr, IsrStatus(self.interrupts, declaration)),
            (layout.config, DeviceConfig(self.bank, declaration)),
            (layout.notify, Notifications(self.bank, declaration)),
            *((place, self.shared[key]) for key, place in layout.shared.items()),
        ]
        window = [(place, region) for place, region in structures if place is not None and region is not None]
        table = self.interrupts.table
        others: list[tuple[Place | None, Region | None]] = [
            (layout.table, table),
            (layout.pba, PendingBits(table) if table is not None else None),
            (layout.legacy, self._legacy),
        ]
        self._regions = window + [(at, region) for at, region in others if at is not None and region is not None]
        named = declaration.capabilities.items()
        self._windows = [
            Window(self._config, self._config.capabilities[name], window, self.bank)
            for name, each in named
            if isinstance(each, PciCfg)
        ]
        places = self._config.capabilities
        self._msix_at = [places[name] + MSIX_CONTROL for name, each in named if isinstance(each, Msix)]
        self._power_at = [(places[name] + POWER_CONTROL, each) for name, each in named if isinstance(each, Power)]
        self._flr_at = [
            (places[name] + EXPRESS_DEVICE_CONTROL + 1, 0x80)
            for name, each in named
            if isinstance(each, Express) and each.flr
        ] + [(places[name] + AF_CONTROL, 0x01) for name, each in named if isinstance(each, AdvancedFeatures)]
        self._registers = SavedFunction(
            self._config,
            self._common,
            self._legacy,
            self.interrupts,
            self.shared,
            power_at=[at for at, _ in self._power_at],
            flr_at=self._flr_at,
        )
        self._carrier_holds = False
        self._held = False
        self.bank.on_call = self.interrupts.call
        self.bank.on_config = self.interrupts.config_changed
        self.bank.on_reset = self._device_reset
        self._settle()

    def __repr__(self) -> str:
        ids = self.declaration.ids
        return f"<VirtioPci {ids.vendor:04x}:{ids.device:04x} of {self.bank.device!r}, status {self.bank.status}>"

    # --- what it is -----------------------------------------------------------------------------------------

    @property
    def loop(self) -> OwnerLoop:
        """See `PciEndpoint.loop`."""
        return self.bank.loop

    @property
    def memory(self) -> GuestMemory:
        """See `PciEndpoint.memory`."""
        return self.bank.memory

    @property
    def bars(self) -> Sequence[Bar]:
        """See `PciEndpoint.bars`."""
        return self.declaration.bars

    @property
    def config_size(self) -> int:
        """See `PciEndpoint.config_size`."""
        return self._config.size

    @property
    def vectors(self) -> int:
        """See `PciEndpoint.vectors`."""
        return self.declaration.layout.vectors

    @property
    def has_line(self) -> bool:
        """See `PciEndpoint.has_line`."""
        return self.declaration.pin != 0

    @property
    def external_table(self) -> bool:
        """See `PciEndpoint.external_table`."""
        table = self.interrupts.table
        return table is not None and table.external

    @external_table.setter
    def external_table(self, external: bool) -> None:
        table = self.interrupts.table
        if table is not None:
            table.external = external
            table.flush()

    @property
    def violations(self) -> Sequence[Exception]:
        """What the driver did against the rules, the first `bank.MAX_ERRORS`; `bank.ignored` counts all of it."""
        return self.bank.errors

    @property
    def awake(self) -> bool:
        """Whether the function is in D0."""
        return not any(self._config.data[at] & 3 for at, _ in self._power_at)

    @property
    def bus_master(self) -> bool:
        """Whether the function may use memory and send messages."""
        return self.awake and bool(self._config.command & MASTER)

    def connect(self, sink: InterruptSink | None) -> None:
        """See `PciEndpoint.connect`; a line that is asserted is told at once."""
        self.interrupts.sink = sink
        if sink is not None and self.interrupts.asserted:
            sink.line(True)  # noqa: FBT003 - a level

    def decodes(self, bar: int) -> bool:
        """Whether the function answers accesses to that BAR now."""
        kind = self._config.bars[bar].kind
        return self.awake and bool(self._config.command & (IO if kind == "io" else MEMORY))

    def bar_base(self, bar: int) -> int:
        """The bus address that is programmed into a BAR."""
        return self._config.base(self._config.bars[bar])

    # --- accesses -------------------------------------------------------------------------------------------

    def read_config(self, offset: int, length: int) -> bytes:
        """See `PciEndpoint.read_config`."""
        self._check(offset, length)
        for each in self._windows:
            each.before_read(offset, length)
        return self._config.read(offset, length)

    def write_config(self, offset: int, data: bytes) -> None:
        """See `PciEndpoint.write_config`."""
        self._check(offset, len(data))
        states = [self._config.data[at] & 3 for at, _ in self._power_at]
        self._config.write(offset, data)
        for each in self._windows:
            each.after_write(offset, len(data))
        woken = self._power(states)
        self._settle()
        asked = False
        for at, bit in self._flr_at:
            if self._config.data[at] & bit:
                self._config.clear(at, bit)
                asked = True
        if woken or asked:
            self.reset()

    def read_bar(self, bar: int, offset: int, length: int) -> bytes:
        """See `PciEndpoint.read_bar`."""
        self._check(offset, length, bar)
        if not self.decodes(bar):
            return b"\xff" * length
        found = find_region(self._regions, bar, offset, length)
        data = None if found is None else found[0].read(found[1], length)
        if data is None:
            self._undefined(f"read with {length} bytes at {offset:#x} of BAR {bar}")
            return b"\xff" * length
        return data

    def write_bar(self, bar: int, offset: int, data: bytes) -> None:
        """See `PciEndpoint.write_bar`."""
        self._check(offset, len(data), bar)
        if not self.decodes(bar):
            return
        found = find_region(self._regions, bar, offset, len(data))
        if found is None:
            self._undefined(f"written with {len(data)} bytes at {offset:#x} of BAR {bar}")
        elif broken := found[0].write(found[1], data):
            self.bank.note(broken)

    def is_notification(self, bar: int, offset: int, length: int) -> bool:
        """See `PciEndpoint.is_notification`."""
        region, at = find_region(self._regions, bar, offset, length) or (None, 0)
        return isinstance(region, Notifications) or (region is self._legacy and (at, length) == _LEGACY_NOTIFY)

    # --- what carriers and resets do ------------------------------------------------------------------------

    def hold(self) -> None:
        """See `PciEndpoint.hold`."""
        self._carrier_holds = True
        self._settle()

    def release(self) -> None:
        """See `PciEndpoint.release`."""
        self._carrier_holds = False
        self._settle()

    def reset(self) -> None:
        """See `PciEndpoint.reset`."""
        self.bank.reset()
        self._config.power_on()
        if self.interrupts.table is not None:
            self.interrupts.table.power_on()
        self._settle()

    # --- saved state ----------------------------------------------------------------------------------------

    def save(self) -> dict[str, object]:
        """Device, queues and the function's registers as JSON values; everything goes on afterwards."""
        return {"version": _STATE_VERSION, "bank": saved.save(self.bank), "function": self._registers.save()}

    def restore(self, state: Mapping[str, object], *, device: Device | None = None) -> None:
        """Take over what `save` gave, around `device` if one is given: one with as many queues.

        Raises:
            SavedStateError: the state is malformed or does not fit; nothing was changed.
        """
        target = self.bank.device if device is None else device
        parts = saved.fields(state, "state of a PCI function", ("version", "bank", "function"))
        saved.version(parts["version"], _STATE_VERSION)
        if len(target.queue_sizes) != len(self.bank.slots):
            raise SavedStateError(
                f"the device has {len(target.queue_sizes)} queues, this function {len(self.bank.slots)}"
            )
        registers = self._registers.check(parts["function"])
        interfaces = ("modern",) if self.declaration.layout.legacy is None else ("modern", "legacy")
        checked = saved.check(self.bank, parts["bank"], target, interfaces=interfaces)
        # No queue starts before the restored command register allows it.
        self._held = True
        self.bank.hold()
        try:
            saved.restore(self.bank, checked)
            self._registers.apply(registers)
        finally:
            self._settle()

    def _device_reset(self) -> None:
        self._common.reset()
        self._legacy.reset()
        self.interrupts.reset()

    def _power(self, before: list[int]) -> bool:
        """Power states after a write; True when the way back to D0 resets the function."""
        woken = False
        for (at, capability), old in zip(self._power_at, before, strict=True):
            new = self._config.data[at] & 3
            if new in (1, 2):
                # A state that is not there: the write is discarded (PCI PM 1.2, 3.2.4).
                self._config.data[at] = self._config.data[at] & ~3 | old
            elif old and not new and not capability.no_soft_reset:
                woken = True
        return woken

    def _settle(self) -> None:
        """Bring everything to what the bits of configuration space say."""
        hold = self._carrier_holds or not self.bus_master
        if hold != self._held:
            self._held = hold
            (self.bank.hold if hold else self.bank.release)()
        table = self.interrupts.table
        if table is not None and self._msix_at:
            control = self._config.word(self._msix_at[0])
            table.control(enabled=bool(control & 0x8000), masked=bool(control & 0x4000))
        self.interrupts.update()

    def _undefined(self, access: str) -> None:
        self.bank.note(StatusViolation("AccessWidth", "4.1.3.1", f"no register is {access}"))

    def _check(self, offset: int, length: int, bar: int | None = None) -> None:
        if offset < 0 or length < 1 or (bar is not None and bar not in self._config.bars):
            where = "configuration space" if bar is None else f"BAR {bar}"
            raise InvalidArgument(f"an access of {length} bytes at {offset} of {where}, which is not there")
