"""After any bad chain a reset is all that a device needs, over every transport: then it serves, byte for byte.

Of the back-ends that people run today most stay dead after most bad chains. Here each of the minimal rings of
`virtio_test.checks` goes to each device over each transport: the rule is found, the driver is told once, the reset
mends it, and the same device, server and connection go on to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from virtio_test._core import Chain, Policy, QueueConfig, RingLayout
from virtio_test.carrier.loopback import Loopback
from virtio_test.checks import EXAMPLES, Example
from virtio_test.clock import Timer
from virtio_test.devices.base import BaseDevice, batched, kept
from virtio_test.devices.blk import BlkDevice
from virtio_test.devices.console import ConsoleDevice
from virtio_test.devices.rng import RngDevice
from virtio_test.devices.test import TestDevice
from virtio_test.driver.base import Driver
from virtio_test.driver.blk import BlkDriver
from virtio_test.driver.console import ConsoleDriver
from virtio_test.driver.rng import RngDriver
from virtio_test.driver.test import TestDriver
from virtio_test.errors import DeviceNeedsReset, HandlerError, PeerError
from virtio_test.spec.status import Status

from tests.hostile.world import (
    AVAIL,
    BUFFER,
    FORMATS,
    LEGACY,
    MIB,
    NEXT,
    TABLE,
    WAYS,
    Pen,
    Target,
    Way,
    honest,
    memory,
    reach,
    spare,
    wanted,
)
from tests.unit.world import PATIENCE

SIZE: Final = 4

WHOLE_LAP = Example(
    rule="ChainTooLong",
    packed=True,
    writes=tuple(
        write
        for slot in range(SIZE)
        for write in (("desc.addr", slot, BUFFER), ("desc.len", slot, 1), ("desc.flags", slot, AVAIL | NEXT))
    ),
)

DEFECTS: Final = [
    example
    for examples in (*EXAMPLES.values(), (WHOLE_LAP,))
    for example in examples
    # Those that need no more than what stands in a fresh ring; impossible queues and states are the registers'.
    if example.end == "device" and not example.config and example.state is None and not example.later
    if example.size in (SIZE, 32)
]


def silent(_line: str) -> None:
    """A console that nobody reads."""


# --- devices, and what each is for ---------------------------------------------------------------------------------


def upper(size: int) -> BaseDevice:
    return BaseDevice(45, handlers={0: bytes.upper}, queue_sizes=(size,))


def rows(requests: memoryview, responses: memoryview) -> None:
    responses[:] = bytes(requests).upper()


def in_batches(size: int) -> BaseDevice:
    return BaseDevice(45, handlers={0: batched(rows, request_size=5, response_size=5)}, queue_sizes=(size,))


def keeping(size: int) -> BaseDevice:
    """Takes now and completes in a later turn of the loop."""

    def take(chain: Chain) -> None:
        answer = chain.read().upper()
        Timer(device.bus.clock, lambda: device.complete(chain, answer), first_after=1e-6)

    device = BaseDevice(45, handlers={0: kept(take)}, queue_sizes=(size,))
    return device


def printing(size: int) -> BaseDevice:
    device = TestDevice(console=silent)
    device.queue_sizes = (size,)
    return device


def disk(size: int) -> BaseDevice:
    return BlkDevice(bytearray(range(256)) * 64, queue_size=size)


def entropy(size: int) -> BaseDevice:
    return RngDevice(source=lambda count: bytes(range(256))[:count], queue_size=size)


def terminal(size: int) -> BaseDevice:
    return ConsoleDevice(Output(), queue_size=size)


class Output:
    """Keeps what a console puts out."""

    def __init__(self) -> None:
        self.data = b""

    def __call__(self, data: bytes) -> None:
        self.data += data


def five_bytes(driver: Driver, _device: BaseDevice) -> None:
    assert driver.submit(0, [b"he", b"llo"], [2, 3]).wait() == b"HELLO"


def large(driver: Driver, _device: BaseDevice) -> None:
    honest(driver, initialize=False)


def numbers(driver: Driver, _device: BaseDevice) -> None:
    assert isinstance(driver, TestDriver)
    assert [each.ret for each in driver.request_many([1, 2])] == [102, 103]


def sectors(driver: Driver, device: BaseDevice) -> None:
    assert isinstance(driver, BlkDriver)
    content = bytes(reversed(range(256))) * 4
    assert driver.read(0, 2) == bytes(range(256)) * 4
    driver.write(2, content)
    assert driver.read(2, 2) == content
    driver.write(2, bytes(range(256)) * 4)


def random_bytes(driver: Driver, _device: BaseDevice) -> None:
    assert isinstance(driver, RngDriver)
    assert driver.read(100) == bytes(range(100))


def text(driver: Driver, device: BaseDevice) -> None:
    assert isinstance(driver, ConsoleDriver)
    assert isinstance(device, ConsoleDevice)
    output = device.ports[0].output
    assert isinstance(output, Output)
    output.data = b""
    driver.send(b"to the device")
    assert output.data == b"to the device"


Kind = tuple[Callable[[int], BaseDevice], type[Driver], Callable[[Driver, BaseDevice], None], int]
"""A device of queues of this size, its driver, a full request, and the queue to attack."""

DEVICES: Final[dict[str, Kind]] = {
    "per request": (upper, Driver, large, 0),
    "batch": (in_batches, Driver, five_bytes, 0),
    "kept": (keeping, Driver, large, 0),
    "test": (printing, TestDriver, numbers, 0),
    "blk": (disk, BlkDriver, sectors, 0),
    "rng": (entropy, RngDriver, random_bytes, 0),
    "console": (terminal, ConsoleDriver, text, 1),
}


def fits(example: Example, name: str, way: Way, *, packed: bool) -> bool:
    if example.packed != packed:
        return False
    if example.rule in ("HeadInFlight", "IdInFlight") and name != "kept":
        # Who has answered a chain before the next is judged may see its head again.
        return False
    if example.size > SIZE and name != "per request":
        # The same chain for all, and as large as a queue can be.
        return False
    # A vhost-user region has no way to say that it may not be written to.
    return not (example.rule == "ReadOnlyAddress" and way == "vhost-user")


class Counted:
    """Counts the configuration changes that a driver is told of."""

    def __init__(self, target: Target) -> None:
        self.times = 0
        self._listen = target.registers.listen
        target.registers.listen = self.listen

    def listen(self, *, call: Callable[[int], object], config_changed: Callable[[], object]) -> None:
        def told() -> None:
            self.times += 1
            config_changed()

        self._listen(call=call, config_changed=told)


def draw(pen: Pen, example: Example) -> None:
    """Write the ring of `example` where the driver's own ring is."""
    entries = RingLayout(32768, packed=example.packed, desc=TABLE)
    for name, index, value in example.writes:
        if name.startswith("table."):
            known = name.replace("table.", "desc.", 1)
            width = entries.fields()[known][1]
            pen.driver.memory.write(entries.at(known, index), value.to_bytes(width, "little"))
        else:
            pen.put(name, value, index)


def cases() -> Iterator[tuple[Way, str, bool]]:
    for way in WAYS:
        for name in DEVICES:
            yield way, name, False
            if way not in LEGACY:
                yield way, name, True


@pytest.mark.row("D16")
@pytest.mark.parametrize(("way", "name", "packed"), [*cases()])
def test_a_bad_chain_is_forgiven_with_the_reset(tmp_path: Path, way: Way, name: str, packed: bool) -> None:
    make, drive, use, queue = DEVICES[name]
    chosen = [example for example in DEFECTS if fits(example, name, way, packed=packed)]
    assert len(chosen) >= 10
    for size in {example.size for example in chosen}:
        ram = memory(256 * MIB, rom=way != "vhost-user")
        with reach(make(size), way, tmp_path, ram=ram, policy=Policy.strict) as target:
            told = Counted(target)
            options: dict[str, Any] = {"console": silent} if drive is TestDriver else {}
            driver = drive(target.registers, arena=spare(ram), timeout=PATIENCE, **options)
            for example in chosen:
                if example.size == size:
                    attack(target, driver, example, queue, told)
                    driver.wanted |= wanted(packed=packed)
                    driver.initialize()
                    use(driver, target.device)
                    assert target.found() == []
            driver.detach()


def attack(target: Target, driver: Driver, example: Example, queue: int, told: Counted) -> None:
    """Bring the device up, break the rule, and see that the driver learns of it once."""
    refused = () if example.indirect else ("INDIRECT_DESC",)
    driver.wanted = (driver.wanted | wanted(packed=example.packed)) - wanted(packed=True)
    driver.wanted |= wanted(packed=example.packed, without=refused)
    driver.initialize()
    driver.loop.run_pending()
    assert driver.queues[queue].layout().packed == example.packed
    before = told.times
    pen = Pen(driver, queue)
    draw(pen, example)
    pen.kick()
    driver.loop.run(until=lambda: driver.broken is not None, timeout=PATIENCE)
    assert isinstance(driver.broken, DeviceNeedsReset), f"{example.rule} is not told: {target.found()}"
    assert driver.registers.read_status() & Status.DEVICE_NEEDS_RESET
    assert target.found() == [example.rule]
    # More kicks change nothing, and nothing more is said.
    for _ in range(3):
        pen.kick()
        driver.loop.run_pending()
    assert target.found() == [example.rule]
    assert told.times == before + 1
    if target.backend is not None:
        session = target.backend.session
        assert session is not None
        error = session.rings.rings[queue].error
        assert error is not None
        assert error.count == 1
    target.forget()


@FORMATS
def test_what_a_defect_is_it_is_for_a_bare_queue_too(packed: bool) -> None:
    """The table itself: each of its rings breaks the rule that it names."""
    for example in DEFECTS:
        if example.packed == packed:
            found = example.run(Policy.strict)
            assert found is not None
            assert found.rule == example.rule


AREAS: Final = ("desc", "driver", "device")


class Misplacing:
    """Enables queues elsewhere than the driver thinks."""

    def __init__(self, target: Target, way: Way) -> None:
        self.area, self.address = "", 0
        self._legacy = way in LEGACY
        self._enable = target.registers.enable_queue
        target.registers.enable_queue = self.enable

    def enable(self, config: QueueConfig) -> None:
        desc, driver, device = (self.address if self.area == area else getattr(config, area) for area in AREAS)
        if self.area and self._legacy:
            layout = RingLayout.legacy(config.size, desc)
            driver, device = layout.driver, layout.device
        features = config.features
        self._enable(
            QueueConfig(config.size, desc=desc, driver=driver, device=device, index=config.index, features=features)
        )


@pytest.mark.row("Q07", "Q08", "Q09", "D11")
@pytest.mark.parametrize("way", WAYS)
def test_an_impossible_queue_is_forgiven_with_the_reset(tmp_path: Path, way: Way) -> None:
    """What a driver writes to registers, or a front-end says of a ring: each area nowhere, over the end, askew."""
    ram = memory()
    with reach(upper(SIZE), way, tmp_path, ram=ram) as target:
        driver = Driver(target.registers, wanted=wanted(packed=False), arena=spare(ram), timeout=PATIENCE)
        misplacing = Misplacing(target, way)
        for area in AREAS:
            for bad in (0x9000_0000, 4 * MIB - 8, 2**64 - 4096, MIB + 1):
                if way in LEGACY and (area != "desc" or bad != 0x9000_0000):
                    # One page number of 32 bits says where all of it is.
                    continue
                misplacing.area, misplacing.address = area, bad
                fails(driver)
                misplacing.area = ""
                honest(driver)


def fails(driver: Driver) -> None:
    """The driver learns that the device is broken, while it brings it up or right after."""
    try:
        driver.initialize()
    except PeerError:
        return
    assert driver.loop.run(until=lambda: driver.broken is not None, timeout=PATIENCE)
    assert isinstance(driver.broken, PeerError)


@pytest.mark.row("D16", "D12")
def test_who_is_not_there_yet_is_told_nothing() -> None:
    """Broken before DRIVER_OK: NEEDS_RESET stands and is not told; broken after it: once, however often."""
    device = upper(SIZE)
    loopback = Loopback(device, memory=memory())
    bank = loopback.bank
    told: list[int] = []
    bank.on_config = lambda: told.append(loopback.read_status())
    for status in (1, 3):
        loopback.write_status(status)
    loopback.write_driver_features(wanted(packed=False).bits)
    loopback.write_status(11)
    loopback.enable_queue(QueueConfig(SIZE, desc=0x9000_0000, driver=0x9000_1000, device=0x9000_2000))
    loopback.loop.run_pending()
    assert loopback.read_status() & Status.DEVICE_NEEDS_RESET
    assert told == []
    driver = Driver(loopback, arena=spare(loopback.memory))
    honest(driver)
    bank.on_config = lambda: told.append(loopback.read_status())
    for _ in range(3):
        bank.broken(HandlerError("the device gives up"))
        loopback.loop.run_pending()
    assert len(told) == 1
