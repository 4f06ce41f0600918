"""An evil driver: brought up as an honest one, it then writes what it likes into its ring, over any transport.

Every way to a device of ours is one context: in one process, or with the device behind a socket in another thread. The
lowest MiB of guest memory is never the honest driver's: there lie the buffers and tables of the attacks.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, cast

import pytest
from virtio_test._core import GuestMemory, Policy, Trace
from virtio_test.carrier.loopback import Loopback
from virtio_test.carrier.mmio import MmioLoopback
from virtio_test.carrier.pci import PciLoopback
from virtio_test.carrier.vfio_user.client import VfioUserClient
from virtio_test.carrier.vfio_user.server import VfioUserServer
from virtio_test.device import RING_FEATURES
from virtio_test.devices.base import BaseDevice
from virtio_test.driver.alloc import Arena
from virtio_test.driver.base import Driver
from virtio_test.driver.mmio import MmioRegisters
from virtio_test.driver.pci import open_pci
from virtio_test.driver.registers import Registers
from virtio_test.errors import DeviceNeedsReset, RuleViolation
from virtio_test.features import FeatureSet
from virtio_test.loop import OwnerLoop
from virtio_test.spec.status import Status
from virtio_test.transport.bank import RegisterBank
from virtio_test.transport.mmio import VirtioMmio
from virtio_test.transport.pci.function import VirtioPci
from virtio_test.transport.vhost_user.backend import Backend
from virtio_test.transport.vhost_user.registers import VhostUserRegisters

from tests.unit.world import PATIENCE, ServerThread, eventually

PAGE: Final = 4096
MIB: Final = 1 << 20
BUFFER: Final = 0x10000
TABLE: Final = 0x20000
ROM: Final = 0x8000_0000
NEXT, WRITE, INDIRECT, AVAIL, USED = 1, 2, 4, 1 << 7, 1 << 15

FORMATS = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])

Way = Literal["loopback", "mmio 1", "mmio 2", "pci", "transitional", "legacy pci", "vhost-user", "vfio-user"]
IN_PROCESS: Final[tuple[Way, ...]] = ("loopback", "mmio 1", "mmio 2", "pci", "transitional", "legacy pci")
WAYS: Final[tuple[Way, ...]] = (*IN_PROCESS, "vhost-user", "vfio-user")
LEGACY: Final[tuple[Way, ...]] = ("mmio 1", "legacy pci")


@dataclass
class Target:
    """One device and how it is reached.

    Attributes:
        registers: the driver's side; with a connection, anew for each driver.
        device: the device.
        bank: what is behind its registers, unless it is behind vhost-user.
        backend: the vhost-user back-end.
    """

    registers: Registers
    device: BaseDevice
    bank: RegisterBank | None = None
    backend: Backend | None = None

    def found(self) -> list[str]:
        """The rules that the device's side found broken, oldest first."""
        if self.bank is not None:
            return [error.rule for error in self.bank.errors if isinstance(error, RuleViolation)]
        assert self.backend is not None
        session = self.backend.session
        broken = [] if session is None else [ring.broken for ring in session.rings.rings]
        return [error.rule for error in broken if isinstance(error, RuleViolation)]

    def forget(self) -> None:
        """Forget what was found."""
        if self.bank is not None:
            self.bank.errors.clear()


def memory(size: int = 4 * MIB, *, trace: Trace | None = None, rom: bool = False) -> GuestMemory:
    """RAM from 0 on, with a page at `ROM` that a device may only read, if wanted."""
    made = GuestMemory([(0, size)], trace=trace)
    if rom:
        made.add_region(ROM, PAGE, writable=False)
    return made


@contextmanager
def reach(
    device: BaseDevice,
    way: Way,
    folder: Path | None = None,
    *,
    ram: GuestMemory | None = None,
    policy: Policy = Policy.interop,
) -> Generator[Target]:
    """Put `device` behind `way`; `folder` is where a socket may be."""
    guest = memory() if ram is None else ram
    if way == "loopback":
        loopback = Loopback(device, memory=guest, policy=policy)
        yield Target(loopback, device, loopback.bank)
    elif way in ("mmio 1", "mmio 2"):
        mmio = VirtioMmio(device, version=1 if way == "mmio 1" else 2, memory=guest, policy=policy)
        yield Target(MmioRegisters(MmioLoopback(mmio)), device, mmio.bank)
    elif way in ("pci", "transitional", "legacy pci"):
        flavour = "non-transitional" if way == "pci" else "transitional"
        function = VirtioPci(device, flavour=flavour, memory=guest, policy=policy)
        interface = "legacy" if way == "legacy pci" else "modern"
        yield Target(open_pci(PciLoopback(function), interface=interface), device, function.bank)
    elif way == "vhost-user":
        assert folder is not None
        backend = Backend(device, path=folder / "s", policy=policy)
        server = ServerThread(folder / "s", backend)
        try:
            with VhostUserRegisters(
                server.path,
                device_id=device.device_id,
                memory=guest,
                queues=len(device.queue_sizes),
                queue_size=device.queue_sizes[0],
                timeout=PATIENCE,
            ) as registers:
                yield Target(registers, device, backend=backend)
        finally:
            server.close()
    else:
        assert folder is not None
        function = VirtioPci(device, loop=OwnerLoop(), memory=GuestMemory(), policy=policy)
        server = ServerThread(folder / "s", VfioUserServer(function, path=folder / "s"))
        try:
            with VfioUserClient(server.path, memory=guest) as client:
                yield Target(open_pci(client), device, function.bank)
        finally:
            server.close()


def wanted(*, packed: bool, without: Sequence[str] = ()) -> FeatureSet:
    """Features of the ring that an honest driver takes."""
    left = RING_FEATURES if packed else RING_FEATURES - FeatureSet("RING_PACKED")
    return left - FeatureSet(*without)


def spare(guest: GuestMemory) -> Arena:
    """Where an honest driver keeps its own, clear of the attacks."""
    ram = max(region.size for region in guest.regions if region.address == 0)
    return Arena(guest, address=MIB, size=min(ram - MIB, 64 * MIB))


class Pen:
    """Writes into the ring of a live driver, and kicks.

    Args:
        driver: whose ring it is.
        queue: which of its rings.
    """

    def __init__(self, driver: Driver, queue: int = 0) -> None:
        self.driver = driver
        self.queue = queue

    @property
    def packed(self) -> bool:
        return self.driver.queues[self.queue].layout().packed

    def put(self, name: str, value: int, index: int = 0) -> None:
        """Overwrite one field of the ring."""
        layout = self.driver.queues[self.queue].layout()
        width = layout.fields()[name][1]
        self.driver.memory.write(layout.at(name, index), value.to_bytes(width, "little"))

    def chain(self, *descriptors: tuple[int, int, int], at: int = 0, available: int = 1) -> None:
        """One chain of (address, length, flags) from descriptor `at` on, which is the `available`-th of a new ring."""
        for place, (address, length, flags) in enumerate(descriptors, at):
            more = NEXT if place < at + len(descriptors) - 1 else 0
            self.put("desc.addr", address, place)
            self.put("desc.len", length, place)
            if self.packed:
                self.put("desc.id", at, place)
                self.put("desc.flags", flags | more | AVAIL, place)
            else:
                self.put("desc.flags", flags | more, place)
                if flags & NEXT or more:
                    self.put("desc.next", place + 1, place)
        if not self.packed:
            self.put("avail.ring", at, available - 1)
            self.put("avail.idx", available)

    def table(self, entries: int, address: int, length: int, flags: int, *, at: int = TABLE) -> int:
        """An indirect table of `entries` equal ones; its bytes."""
        one = address.to_bytes(8, "little") + length.to_bytes(4, "little")
        if self.packed:
            body = (one + bytes(2) + flags.to_bytes(2, "little")) * entries
        else:
            links = [(flags | NEXT, link + 1) for link in range(entries - 1)] + [(flags, 0)]
            body = b"".join(one + f.to_bytes(2, "little") + (n & 0xFFFF).to_bytes(2, "little") for f, n in links)
        self.driver.memory.write(at, body)
        return len(body)

    def kick(self) -> None:
        self.driver.registers.kick_notifier(self.queue, lambda: 0).notify()


class Attacker(Driver):
    """A driver that counts the configuration changes that it is told of, and goes on as it was told."""

    told = 0

    def _config_interrupt(self) -> None:
        self.told += 1
        super()._config_interrupt()

    def pen(self, queue: int = 0) -> Pen:
        return Pen(self, queue)

    def run(self) -> None:
        """Let what can happen happen; over a socket, use `eventually`."""
        self.loop.run_pending()


def attacker(
    device: BaseDevice | None = None,
    *,
    packed: bool = False,
    policy: Policy = Policy.interop,
    trace: Trace | None = None,
    without: Sequence[str] = (),
    size: int = 4 * MIB,
    queue_size: int | None = None,
    classes: FeatureSet | None = None,
) -> tuple[Target, Attacker]:
    """An evil driver in one process with `device`, or with one that answers in upper case."""
    ram = memory(size, trace=trace)
    made = upper() if device is None else device
    loopback = Loopback(made, memory=ram, policy=policy)
    features = wanted(packed=packed, without=without)
    driver = Attacker(
        loopback,
        wanted=features if classes is None else classes | features,
        arena=spare(ram),
        queue_size=queue_size,
    )
    driver.initialize()
    driver.loop.run_pending()
    return Target(loopback, made, loopback.bank), driver


def upper(queue_size: int = 128, **options: Any) -> BaseDevice:
    """A device that answers in upper case."""
    return BaseDevice(45, handlers={0: bytes.upper}, queue_sizes=(queue_size,), **options)


def honest(driver: Driver, *, initialize: bool = True) -> None:
    """The device serves a driver of good will, byte for byte."""
    if initialize:
        driver.initialize()
    for text in (b"hello", b"a" * 5000):
        assert driver.submit(0, [text[:3], text[3:]], [2, len(text)]).wait() == text.upper()


def broken(target: Target, driver: Driver, rule: str) -> None:
    """The device says once that it is broken, for this rule, to a driver that then may reset it."""
    before = cast("int", getattr(driver, "told", 0))
    assert driver.loop.run(until=lambda: driver.broken is not None, timeout=PATIENCE), f"{rule} is not told"
    assert isinstance(driver.broken, DeviceNeedsReset)
    assert driver.registers.read_status() & Status.DEVICE_NEEDS_RESET
    assert target.found() == [rule]
    for _ in range(3):
        driver.loop.run_pending()
    assert getattr(driver, "told", 1) - before <= 1, "it is told once"
    assert target.found() == [rule]


def settled(holds: Callable[[], bool]) -> None:
    assert eventually(holds)
