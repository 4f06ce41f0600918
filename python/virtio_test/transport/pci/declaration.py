"""`Declaration`: all that a PCI function says about itself, as data.

Theory
------
There are two things, which agree in a good device: what the configuration space *claims* (`ids`, `bars`,
`capabilities`, `patches`), and where the registers *are* (`layout`). `flavours.declare` makes both for a device.
A device that is wrong on purpose is a good one with something changed::

    good = declare(device, flavour="non-transitional")
    short = good.change("notify", length=2)                     # the capability claims 2 bytes
    loop = good.change("isr", next=good_offset_of_common)       # the list never ends
    none = good.replace(registers={"num_queues": 0})            # this register reads 0, whatever is true
    stuck = good.replace(registers={"device_status": lambda real: real or 1})    # a reset that never ends
    stubborn = good.replace(registers={"device_status": lambda real: real & ~8})  # FEATURES_OK never appears
    deaf = good.replace(deaf=frozenset({"queue_enable"}))       # writes of this register do nothing
    odd = good.replace(patches={0x34: bytes([2])})               # any byte of configuration space
    function = VirtioPci(device, declaration=short)

Register names are those of the common configuration structure; ``isr``, ``notify`` and ``config`` are the other
structures, and ``legacy.…`` the registers of the legacy interface.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from virtio_test.errors import InvalidArgument

from .capabilities import Capability, ExtendedCapability
from .interface import Bar

__all__ = ["Declaration", "Ids", "Layout", "Override", "Place"]

Override = int | Callable[[int], int]
"""What a register reads: always this number, or what the function makes of the true one."""


class Ids(NamedTuple):
    """The identity of a function.

    Attributes:
        vendor: PCI vendor id.
        device: PCI device id.
        revision: 8 bits.
        class_code: base class, subclass and programming interface, 24 bits.
        subsystem_vendor: 16 bits.
        subsystem: 16 bits; of a transitional device its virtio id.
    """

    vendor: int
    device: int
    revision: int
    class_code: int
    subsystem_vendor: int
    subsystem: int


class Place(NamedTuple):
    """A structure's place: BAR, offset in it, length in bytes."""

    bar: int
    offset: int
    length: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the registers are.

    Attributes:
        common: the common configuration structure.
        notify: the notification structure; on pages of its own, which no carrier may map.
        isr: the ISR status.
        config: the device configuration space; None when it is empty.
        multiplier: bytes between two queues' places in `notify`.
        vectors: entries of the MSI-X table; 0 without MSI-X.
        table: the MSI-X table.
        pba: its pending bits.
        legacy: the legacy registers; None when there is no such interface.
        shared: region id → place of the shared memory regions.
        admin_queues: how many of the device's queues, the last ones, are administration virtqueues.
    """

    common: Place
    notify: Place
    isr: Place
    config: Place | None = None
    multiplier: int = 4
    vectors: int = 0
    table: Place | None = None
    pba: Place | None = None
    legacy: Place | None = None
    shared: Mapping[int, Place] = field(default_factory=dict[int, Place])
    admin_queues: int = 0


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """A PCI function as data.

    Attributes:
        ids: its identity.
        bars: its base address registers.
        layout: where the registers are.
        capabilities: name → capability, in the order of the list.
        extended: capabilities of the extended configuration space.
        extended_space: whether there are 4096 bytes of configuration space, as with PCI Express.
        pin: interrupt pin, 1 for INTA#; 0 for none.
        patches: offset → bytes of configuration space, put over everything else.
        registers: register → what it reads.
        deaf: registers whose writes do nothing.
    """

    ids: Ids
    bars: tuple[Bar, ...]
    layout: Layout
    capabilities: Mapping[str, Capability]
    extended: tuple[ExtendedCapability, ...] = ()
    extended_space: bool = False
    pin: int = 1
    patches: Mapping[int, bytes] = field(default_factory=dict[int, bytes])
    registers: Mapping[str, Override] = field(default_factory=dict[str, Override])
    deaf: frozenset[str] = frozenset()

    def replace(
        self,
        *,
        ids: Ids | None = None,
        bars: tuple[Bar, ...] | None = None,
        layout: Layout | None = None,
        capabilities: Mapping[str, Capability] | None = None,
        extended: tuple[ExtendedCapability, ...] | None = None,
        extended_space: bool | None = None,
        pin: int | None = None,
        patches: Mapping[int, bytes] | None = None,
        registers: Mapping[str, Override] | None = None,
        deaf: frozenset[str] | None = None,
    ) -> Declaration:
        """The same declaration with other attributes; None leaves one as it is."""
        given = {
            "ids": ids,
            "bars": bars,
            "layout": layout,
            "capabilities": capabilities,
            "extended": extended,
            "extended_space": extended_space,
            "pin": pin,
            "patches": patches,
            "registers": registers,
            "deaf": deaf,
        }
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return replace(self, **changes)

    def change(self, capability: str, /, **changes: Any) -> Declaration:
        """The same declaration with other values in one capability.

        Raises:
            InvalidArgument: there is no such capability.
        """
        self._known(capability)
        changed = self.capabilities[capability].replace(**changes)
        return replace(self, capabilities={**self.capabilities, capability: changed})

    def add(self, name: str, capability: Capability, /, *, first: bool = False) -> Declaration:
        """The same declaration with one more capability, at the end of the list or at its start."""
        old = dict(self.capabilities)
        return replace(self, capabilities={name: capability, **old} if first else {**old, name: capability})

    def without(self, *names: str) -> Declaration:
        """The same declaration without these capabilities.

        Raises:
            InvalidArgument: there is no such capability.
        """
        for each in names:
            self._known(each)
        return replace(self, capabilities={name: each for name, each in self.capabilities.items() if name not in names})

    def _known(self, name: str) -> None:
        if name not in self.capabilities:
            raise InvalidArgument(f"no capability {name!r}; there are {', '.join(self.capabilities)}")
