"""SUSPEND (VIRTIO 1.4, 3.4): row D17 and its clauses, over every register transport in process."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable

import pytest
from virtio_test._core import Chain, GuestMemory
from virtio_test.carrier.loopback import Loopback
from virtio_test.clock import VirtualClock
from virtio_test.config import ConfigLayout, ConfigSpace
from virtio_test.devices.base import BaseDevice, kept
from virtio_test.devices.test import TestDevice
from virtio_test.driver.base import Driver
from virtio_test.driver.request import Request
from virtio_test.driver.test import TestDriver
from virtio_test.errors import (
    DeviceNeedsReset,
    HandlerError,
    NoFeature,
    PeerTimeout,
    QueueViolation,
    StateError,
    StatusViolation,
)
from virtio_test.features import FeatureSet
from virtio_test.loop import OwnerLoop
from virtio_test.status import Status

from tests.unit.ways import RINGS, WAYS, Way, features, reach

pytestmark = pytest.mark.row("D17")

SUSPEND = FeatureSet("SUSPEND")
LAYOUT = ConfigLayout(("level", "le32"), ("mode", "le32", "rw"))
LIVE = int(Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK | Status.DRIVER_OK)
ASLEEP = LIVE & ~Status.DRIVER_OK | Status.SUSPEND


USES: dict[str, Callable[[Driver], object]] = {
    "add": lambda driver: driver.submit(0, [b"x"], [1]),
    "kick": lambda driver: driver.flush(0),
    "reset a queue": lambda driver: driver.reset_queue(0),
    "suspend again": lambda driver: driver.suspend(),
}


class Keeper(BaseDevice):
    """Keeps what comes, and lets go of it only if it is told to."""

    def __init__(self, *, lets_go: bool = True, cancel_seconds: float = 1.0) -> None:
        self.lets_go = lets_go
        space = ConfigSpace(LAYOUT, level=1)
        super().__init__(
            7, handlers={0: kept(lambda _: None)}, queue_sizes=(16,), config=space, cancel_seconds=cancel_seconds
        )

    def cancel(self, chain: Chain) -> bool:  # noqa: ARG002 - any chain
        return self.lets_go


def world(way: str, ring: str = "split", device: BaseDevice | None = None) -> tuple[BaseDevice, Way, Driver]:
    device = Keeper() if device is None else device
    over = reach(device, way, more=SUSPEND)
    driver = Driver(over.registers, wanted=features(ring) | SUSPEND, layout=LAYOUT)
    driver.initialize()
    over.run()
    return device, over, driver


def whole(memory: GuestMemory) -> str:
    return hashlib.sha256(b"".join(memory.read(each.address, each.size) for each in memory.regions)).hexdigest()


@WAYS
@RINGS
def test_there_and_back_with_requests_in_flight(way: str, ring: str) -> None:
    device, over, driver = world(way, ring)
    waiting = [driver.submit(0, [bytes([number])], [1]) for number in range(5)]
    over.run()
    assert len(device.kept) == 5
    driver.suspend()
    assert (driver.suspended, driver.live) == (True, False)
    assert over.registers.read_status() == ASLEEP
    assert device.kept == [], "drained: they lie in the ring again"
    driver.resume()
    assert (driver.suspended, driver.live) == (False, True)
    assert over.registers.read_status() == LIVE
    over.run()
    for chain in device.kept:
        device.complete(chain, chain.read())
    assert [each.wait() for each in waiting] == [bytes([number]) for number in range(5)]
    assert over.bank.errors == []


@WAYS
@RINGS
def test_suspended_it_touches_no_memory_and_tells_nothing(way: str, ring: str) -> None:
    """Clauses 116 and 117: not for a kick, a change, a carrier that moves memory or the device's own threads."""
    device, over, driver = world(way, ring)
    assert isinstance(device, Keeper)
    waiting = driver.submit(0, [b"x"], [1])
    over.run()
    (chain,) = device.kept
    driver.suspend()
    over.run()
    before = whole(over.bank.memory)
    heard: list[str] = []
    over.registers.listen(call=lambda _: heard.append("call"), config_changed=lambda: heard.append("config"))
    assert not device.complete(chain, b"y")
    device.config.update(level=9)
    device.bus.call(0)
    over.bank.kick(0)
    over.run()
    over.bank.hold()
    over.run()
    over.bank.release()
    over.run()
    assert whole(over.bank.memory) == before
    assert heard == []
    assert not waiting.done
    assert over.bank.ignored == {"UsedWhileSuspended": 1}


@WAYS
def test_what_was_done_before_is_told_before(way: str) -> None:
    """Clause 121: used buffers of the drain are notified while DRIVER_OK still stands."""
    device, over, driver = world(way, device=Keeper(lets_go=True))
    assert isinstance(device, Keeper)
    told: list[int] = []
    driver.submit(0, [b"x"], [4])
    over.run()
    device.kept[0].write(b"half")  # so it cannot go back into the ring
    over.bank.on_call = lambda _: told.append(over.registers.read_status())
    device.lets_go = False
    device.cancel_seconds = 5.0
    done = threading.Timer(0.05, lambda: device.complete(device.kept[0]))
    done.start()
    over.registers.write_status(LIVE | Status.SUSPEND)
    assert over.registers.read_status() == LIVE, "not before it has drained"
    over.run()
    done.join()
    assert over.registers.read_status() == ASLEEP
    assert told == [LIVE]


@WAYS
def test_the_driver_hears_of_it_at_the_resume(way: str) -> None:
    device, over, driver = world(way)
    assert isinstance(device, Keeper)
    request = driver.submit(0, [b"x"], [1])
    over.run()
    chain = device.kept[0]
    chain.write(b"y")
    driver.suspend()
    assert not request.done
    driver.resume()
    over.run()
    assert request.response == b"", "it could neither go back nor be answered"
    assert over.bank.errors == []


@WAYS
def test_a_handler_of_answers_may_submit_whenever_they_come(way: str) -> None:
    device, over, driver = world(way)
    later: list[Request] = []
    driver.submit(0, [b"x"], [1], on_done=lambda _: later.append(driver.submit(0, [b"z"], [1])))
    over.run()
    device.complete(device.kept[0], b"y")
    driver.suspend()
    assert later == []
    driver.resume()
    assert len(later) == 1


@WAYS
def test_the_configuration_stands_still_and_its_change_is_told_at_the_resume(way: str) -> None:
    """Clauses 116 to 118."""
    device, over, driver = world(way)
    driver.suspend()
    generation = over.registers.config_generation()
    changes: list[object] = []
    driver.config_changed = lambda: changes.append(driver.read_field("level"))
    device.config.update(level=5)
    device.config.update(level=6)
    over.run()
    assert (driver.read_field("level"), over.registers.config_generation()) == (1, generation)
    assert changes == []
    driver.resume()
    over.run()
    assert changes == [6]
    assert over.registers.config_generation() != generation


@WAYS
def test_what_the_driver_writes_meanwhile_is_ignored(way: str) -> None:
    """Clauses 113 and 115, at both ends."""
    device, over, driver = world(way)
    driver.suspend()
    with pytest.raises(StateError, match="suspended"):
        driver.write_field("mode", 3)
    over.registers.write_config(4, (3).to_bytes(4, "little"))
    assert device.config.mode == 0
    assert over.bank.ignored == {"UsedWhileSuspended": 1}
    driver.resume()
    driver.write_field("mode", 3)
    assert device.config.mode == 3


@WAYS
@pytest.mark.parametrize("use", USES)
def test_the_driver_may_not(way: str, use: str) -> None:
    """Clauses 111 and 112."""
    _, over, driver = world(way)
    driver.suspend()
    before = whole(over.bank.memory)
    with pytest.raises(StateError, match="suspended"):
        USES[use](driver)
    assert whole(over.bank.memory) == before
    driver.resume()
    with pytest.raises(StateError, match="not suspended"):
        driver.resume()


@WAYS
def test_without_its_feature(way: str) -> None:
    """Clauses 109 and 115: neither does our driver ask, nor does our device listen."""
    device = Keeper()
    over = reach(device, way)
    driver = Driver(over.registers)
    assert "SUSPEND" not in driver.initialize()
    with pytest.raises(NoFeature, match="SUSPEND"):
        driver.suspend()
    over.registers.write_status(LIVE | Status.SUSPEND)
    over.run()
    assert over.registers.read_status() == LIVE
    assert over.bank.ignored == {"SuspendNotPossible": 1}


@WAYS
def test_before_the_device_is_initialized(way: str) -> None:
    over = reach(Keeper(), way, more=SUSPEND)
    over.registers.write_driver_features((over.bank.offered - FeatureSet("RING_PACKED")).bits)
    for status in (1, 3, 11):
        over.registers.write_status(status)
        over.registers.write_status(status | Status.SUSPEND)
        over.run()
        assert over.registers.read_status() == status


@WAYS
def test_twice_is_once(way: str) -> None:
    device, over, driver = world(way)
    driver.submit(0, [b"x"], [1])
    over.run()
    for _ in range(2):
        over.registers.write_status(LIVE | Status.SUSPEND)
    over.run()
    assert over.registers.read_status() == ASLEEP
    for _ in range(2):
        over.registers.write_status(ASLEEP | Status.DRIVER_OK)
    over.run()
    assert over.registers.read_status() == LIVE
    assert len(device.kept) == 1
    assert over.bank.errors == []


@WAYS
def test_a_device_that_cannot_drain_needs_a_reset(way: str) -> None:
    """Clause 119."""
    device, over, driver = world(way, device=Keeper(lets_go=False, cancel_seconds=0.01))
    request = driver.submit(0, [b"x"], [1])
    over.run()
    with pytest.raises(DeviceNeedsReset):
        driver.suspend()
    assert isinstance(request.error, DeviceNeedsReset)
    assert over.registers.read_status() & Status.DEVICE_NEEDS_RESET
    assert not over.registers.read_status() & Status.SUSPEND
    assert isinstance(over.bank.errors[0], HandlerError)
    assert_heals(device, over, driver)


class Stiff(Keeper):
    """Cannot start a queue a second time."""

    starts = 0

    def start_queue(self, queue: object) -> None:
        self.starts += 1
        if self.starts == 2:
            raise OSError("stiff")
        super().start_queue(queue)  # type: ignore[arg-type]


@WAYS
def test_a_device_that_cannot_go_on_needs_a_reset(way: str, caplog: pytest.LogCaptureFixture) -> None:
    """Clause 120."""
    device, over, driver = world(way, device=Stiff())
    driver.suspend()
    with pytest.raises(DeviceNeedsReset):
        driver.resume()
    assert [record.message for record in caplog.records] == ["the device failed"]
    assert_heals(device, over, driver)


@WAYS
def test_broken_while_suspended_is_seen_and_not_told(way: str) -> None:
    device, over, driver = world(way)
    driver.suspend()
    told: list[str] = []
    over.registers.listen(call=lambda _: None, config_changed=lambda: told.append("config"))
    over.bank.broken(HandlerError("the house burns"))
    over.run()
    assert told == []
    with pytest.raises(DeviceNeedsReset):
        driver.resume()
    assert_heals(device, over, driver)


@WAYS
@pytest.mark.parametrize("moment", ["asked for", "suspended", "resume asked for"])
def test_a_reset_ends_it(way: str, moment: str) -> None:
    device, over, driver = world(way)
    request = driver.submit(0, [b"x"], [1])
    over.run()
    over.registers.write_status(LIVE | Status.SUSPEND)
    if moment != "asked for":
        over.run()
        device.config.update(level=4)
    if moment == "resume asked for":
        over.registers.write_status(ASLEEP | Status.DRIVER_OK)
    driver.reset()
    assert isinstance(request.error, StateError)
    told: list[str] = []
    over.registers.listen(call=lambda _: told.append("call"), config_changed=lambda: told.append("config"))
    over.run()
    assert told == []
    assert over.registers.read_status() == 0
    assert over.bank.suspension.view is None
    assert_heals(device, over, driver)


def assert_heals(device: BaseDevice, over: Way, driver: Driver) -> None:
    """After a reset everything is there, suspension included."""
    driver.initialize()
    assert driver.read_field("level") == device.config.level
    request = driver.submit(0, [b"x"], [1])
    over.run()
    assert isinstance(device, Keeper)
    device.lets_go = True
    driver.suspend()
    driver.resume()
    over.run()
    device.complete(device.kept[0], b"y")
    assert request.wait() == b"y"


@WAYS
def test_a_device_that_never_says_so_is_waited_for_in_bounds(way: str) -> None:
    """Clauses 110 and 114."""
    device, over, driver = world(way)
    request = driver.submit(0, [b"x"], [1])
    over.run()
    over.bank.suspension.suspend = lambda: None
    driver.timeout = 0.5
    with pytest.raises(PeerTimeout, match="suspension"):
        driver.suspend()
    assert isinstance(request.error, PeerTimeout)
    with pytest.raises(PeerTimeout):
        driver.submit(0, [b"x"], [1])
    del over.bank.suspension.suspend
    assert_heals(device, over, driver)


class Lying(Loopback):
    """Shows one bit too many once it is suspended."""

    invented = 0

    def read_status(self) -> int:
        read = super().read_status()
        return read | self.invented if read & Status.SUSPEND else read


@pytest.mark.parametrize("invented", [Status.FAILED, 0x20])
def test_a_device_that_shows_another_status_is_found_out(invented: int) -> None:
    device = Keeper()
    registers = Lying(device, offered=device.features | SUSPEND)
    registers.invented = invented
    driver = Driver(registers)
    driver.initialize()
    with pytest.raises(StatusViolation, match="StatusBitInvented"):
        driver.suspend()
    with pytest.raises(StatusViolation, match="StatusBitInvented"):
        driver.submit(0, [b"x"])


def test_it_waits_in_the_loop_and_not_inside_it() -> None:
    _, over, driver = world("in process")
    caught: list[Exception] = []

    def inside() -> None:
        try:
            driver.suspend()
        except StateError as error:
            caught.append(error)

    over.bank.loop.call_soon(inside)
    over.run()
    assert len(caught) == 1
    assert driver.live
    driver.suspend()


def test_the_timer_of_the_device_goes_on_and_is_heard_at_the_resume() -> None:
    lines: list[str] = []
    clock = VirtualClock()
    device = TestDevice(timer=True, console=lines.append)
    over = reach(device, "in process", more=SUSPEND, loop=OwnerLoop(clock=clock))
    driver = TestDriver(over.registers, timer=True, console=lambda _: None)
    driver.initialize()
    driver.suspend()
    clock.advance(33.5)
    over.run()
    driver.resume()
    over.run()
    assert lines == [
        "==============set config:0",
        "==============set config:1",
        "==============set config:2",
        "==============set config:3",
        "=========get virtio num:1",
    ], "four ticks were one change"


@WAYS
@RINGS
def test_a_suspended_device_is_saved_and_restored_suspended(way: str, ring: str) -> None:
    device, over, driver = world(way, ring)
    request = driver.submit(0, [b"x"], [1])
    over.run()
    driver.suspend()
    other = Keeper()
    over.side.restore(over.side.save(), device=other)
    over.run()
    assert over.registers.read_status() == ASLEEP
    assert other.kept == []
    driver.resume()
    over.run()
    other.complete(other.kept[0], b"y")
    assert request.wait() == b"y"
    assert device.kept == []


@WAYS
def test_what_changes_behind_a_restore_is_told_at_the_resume(way: str) -> None:
    device, over, driver = world(way)
    driver.suspend()
    over.side.restore(over.side.save(), device=device)
    changes: list[object] = []
    driver.config_changed = lambda: changes.append(driver.read_field("level"))
    device.config.update(level=5)
    over.run()
    assert changes == []
    driver.resume()
    over.run()
    assert changes == [5]


@WAYS
def test_a_state_that_is_saved_half_way_is_that_of_the_end(way: str) -> None:
    _, over, driver = world(way)
    driver.submit(0, [b"x"], [1])
    over.run()
    over.registers.write_status(LIVE | Status.SUSPEND)
    state = over.side.save()
    assert over.registers.read_status() == ASLEEP
    over.registers.write_status(ASLEEP | Status.DRIVER_OK)
    over.side.save()
    assert over.registers.read_status() == LIVE
    over.side.restore(state)
    assert over.registers.read_status() == ASLEEP


def test_a_queue_that_breaks_in_the_last_turn_is_no_suspension() -> None:
    """The ring breaks between the driver's SUSPEND and the drain: NEEDS_RESET, and never SUSPEND."""
    _, over, _ = world("in process")
    over.registers.write_status(LIVE | Status.SUSPEND)
    over.bank.broken(QueueViolation("AvailIdxTooFar", "2.7.13", "by hand", queue=0))
    over.run()
    assert over.registers.read_status() == LIVE | Status.DEVICE_NEEDS_RESET
    assert over.bank.suspension.view is None, "its configuration space stands still for ever"


@WAYS
@pytest.mark.parametrize("moment", ["before", "while suspended"])
def test_what_could_not_be_told_is_told_once_at_the_resume(way: str, moment: str) -> None:
    """Notifications that were marked, and not yet sent when a state was saved in the middle; and later ones."""
    device, over, _ = world(way)
    told: list[object] = []
    over.bank.on_call = told.append
    over.bank.on_config = lambda: told.append("config")
    over.registers.write_status(LIVE | Status.SUSPEND)
    if moment == "before":
        device.bus.call(0)
        device.bus.config_changed()
    over.side.save()
    assert over.registers.read_status() == ASLEEP
    if moment != "before":
        device.bus.call(0)
        device.bus.config_changed()
    over.run()
    assert told == []
    over.registers.write_status(ASLEEP | Status.DRIVER_OK)
    over.run()
    assert told == [0, "config"]


@WAYS
@pytest.mark.parametrize("moment", ["asked for", "suspended"])
def test_nothing_of_it_outlives_a_reset(way: str, moment: str) -> None:
    """Neither a turn that was to come, nor a notification that waits."""
    device, over, driver = world(way)
    over.registers.write_status(LIVE | Status.SUSPEND)
    if moment == "suspended":
        over.run()
        device.bus.call(0)
        device.bus.config_changed()
    driver.initialize()
    over.run()
    driver.submit(0, [b"x"], [1])
    over.run()
    assert len(device.kept) == 1, "the queue of the new life was stopped"
    device.complete(device.kept[0], b"y")
    over.run()
    told: list[object] = []
    over.bank.on_call = told.append
    over.bank.on_config = lambda: told.append("config")
    driver.suspend()
    driver.resume()
    over.run()
    assert told == []


@WAYS
def test_a_state_saved_while_suspended_leaves_it_so(way: str) -> None:
    """What it shows of its configuration space stays as it was, and what waits to be told waits."""
    device, over, driver = world(way)
    driver.suspend()
    assert not over.bank.config_due
    device.config.update(level=9)
    assert over.bank.config_due
    over.side.save()
    assert over.registers.read_status() == ASLEEP
    assert over.bank.read_config(0, 4) == (1).to_bytes(4, "little")
    assert over.bank.config_due


@WAYS
def test_a_kick_while_suspended_is_noted(way: str) -> None:
    _, over, driver = world(way)
    driver.suspend()
    over.bank.kick(0)
    over.run()
    assert over.bank.ignored == {"UsedWhileSuspended": 1}


def test_a_device_that_nobody_drives_notifies_nobody() -> None:
    device = Keeper()
    over = reach(device, "in process", more=SUSPEND)
    told: list[object] = []
    over.bank.on_call = told.append
    over.bank.on_config = lambda: told.append("config")
    over.bank.call(0)
    over.bank.config_changed()
    over.run()
    assert (told, over.bank.config_due) == ([], False)
