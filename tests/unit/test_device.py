"""Devices from handlers: three ways to write one, handlers that raise, and queues that stop with kept chains."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import pytest
from virtio_test._core import Chain, Notifier, QueueConfig
from virtio_test.carrier.loopback import Loopback
from virtio_test.config import ConfigLayout, ConfigSpace
from virtio_test.device import RING_FEATURES, Bus, Device
from virtio_test.devices.base import BaseDevice, batched, kept
from virtio_test.driver.base import Driver
from virtio_test.driver.request import Request
from virtio_test.errors import (
    DeviceNeedsReset,
    HandlerError,
    InvalidArgument,
    QueueViolation,
    SavedStateError,
    StateError,
)
from virtio_test.features import FeatureSet

RINGS = pytest.mark.parametrize("ring", ["split", "packed"])


def bring_up(device: Device, ring: str = "split", *, queue_size: int | None = None) -> tuple[Loopback, Driver]:
    loopback = Loopback(device)
    wanted = RING_FEATURES if ring == "packed" else RING_FEATURES - FeatureSet("RING_PACKED")
    driver = Driver(loopback, wanted=wanted, queue_size=queue_size)
    driver.initialize()
    return loopback, driver


def upper(request: bytes) -> bytes:
    return request.upper()


def upper_rows(requests: memoryview, responses: memoryview) -> None:
    responses[:] = bytes(requests).upper()


class Keeper(BaseDevice):
    """Takes chains, answers on demand."""

    def __init__(self, *, cancel_seconds: float = 5.0) -> None:
        super().__init__(7, handlers={0: kept(lambda _: None)}, cancel_seconds=cancel_seconds)
        self.lets_go: Callable[[Chain], bool] = super().cancel

    def cancel(self, chain: Chain) -> bool:
        return self.lets_go(chain)


# --- three ways --------------------------------------------------------------------------------------------


@RINGS
@pytest.mark.parametrize("way", ["request", "batch", "kept"])
def test_three_ways_give_the_same_answers(ring: str, way: str) -> None:
    if way == "kept":
        device = BaseDevice(7, handlers={0: kept(lambda chain: device.complete(chain, chain.read().upper()))})
    else:
        handler = upper if way == "request" else batched(upper_rows, request_size=5, response_size=5, limit=7)
        device = BaseDevice(7, handlers={0: handler})
    loopback, driver = bring_up(device, ring)
    before = driver.arena.used
    requests = [driver.submit(0, [f"ab{number:03}".encode()], [5], publish=False) for number in range(50)]
    driver.flush(0)
    assert [each.wait() for each in requests] == [f"AB{number:03}".encode() for number in range(50)]
    assert loopback.errors == []
    assert driver.arena.used == before, "every buffer came back"
    assert loopback.queue(0).in_flight == 0
    assert ("IN_ORDER" in driver.features) == (way != "kept")


def test_more_than_one_turn_holds() -> None:
    # The budget of one kick is smaller than the queue.
    device = BaseDevice(7, handlers={0: upper}, queue_sizes=(1024,))
    _, driver = bring_up(device)
    requests = [driver.submit(0, [b"a"], [1], publish=False) for _ in range(512)]
    driver.flush(0)
    assert all(each.wait() == b"A" for each in requests)


def test_a_queue_without_a_handler_is_left_alone() -> None:
    device = BaseDevice(7, handlers={0: upper}, queue_sizes=(8, 8))
    loopback, driver = bring_up(device)
    driver.submit(1, [b"wait"])
    loopback.loop.run_pending()
    assert len(driver.in_flight) == 1
    assert loopback.queue(1).counters.popped == 0


def test_buffers_before_driver_ok_need_no_kick() -> None:
    class Early(Driver):
        request: Request | None = None

        def set_up(self) -> None:
            self.request = self.submit(0, [b"early"], [5], publish=False)
            self.queues[0].publish()

    class Deaf(Loopback):
        def kick_notifier(self, index: int, position: Callable[[], int]) -> Notifier:  # noqa: ARG002
            return Notifier.callback(lambda: index)

    driver = Early(Deaf(BaseDevice(7, handlers={0: upper})))
    driver.initialize()
    assert driver.request is not None
    assert driver.request.wait() == b"EARLY"


# --- misuse ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: BaseDevice(0, handlers={}),
        lambda: BaseDevice(0x10000, handlers={}),
        lambda: BaseDevice(7, handlers={1: upper}, queue_sizes=(8,)),
        lambda: BaseDevice(7, handlers={-1: upper}, queue_sizes=(8,)),
        lambda: BaseDevice(7, handlers={0: upper}, queue_sizes=(0,)),
        lambda: BaseDevice(7, handlers={0: upper}, queue_sizes=(32769,)),
        lambda: BaseDevice(7, handlers={0: upper}, on_handler_error="ignore"),  # pyright: ignore[reportArgumentType]
        lambda: batched(upper_rows, request_size=-1, response_size=1),
        lambda: batched(upper_rows, request_size=1, response_size=1, limit=0),
    ],
)
def test_impossible_devices(make: Callable[[], object]) -> None:
    with pytest.raises(InvalidArgument):
        make()


def test_without_a_bus_or_a_queue_it_says_so() -> None:
    device = BaseDevice(7, handlers={0: upper})
    assert isinstance(device, Device)
    with pytest.raises(StateError, match="no bus"):
        _ = device.bus
    with pytest.raises(StateError, match="does not run"):
        device.queue(0)
    assert device.kicked(0) is False
    assert device.kicked(99) is False
    device.stop_queue(0)
    loopback = Loopback(device)
    assert isinstance(loopback.bank, Bus)
    assert device.bus is loopback.bank


# --- handlers that raise -----------------------------------------------------------------------------------


def failing(word: bytes) -> Callable[[bytes], bytes]:
    def handle(request: bytes) -> bytes:
        if request == word:
            raise RuntimeError("from the handler")
        return request.upper()

    return handle


def failing_rows(requests: memoryview, responses: memoryview) -> None:
    if b"bad" in bytes(requests):
        raise RuntimeError("from the handler")
    upper_rows(requests, responses)


def failing_chain(device: Callable[[], BaseDevice]) -> Callable[[Chain], object]:
    def handle(chain: Chain) -> None:
        if chain.read() == b"bad":
            raise RuntimeError("from the handler")
        device().complete(chain, chain.read().upper())

    return handle


def make_failing(way: str, on_error: str) -> BaseDevice:
    made: list[BaseDevice] = []
    handler = {
        "request": failing(b"bad"),
        "batch": batched(failing_rows, request_size=3, response_size=3),
        "kept": kept(failing_chain(lambda: made[0])),
    }[way]
    assert on_error in ("broken", "complete0")
    made.append(BaseDevice(7, handlers={0: handler}, on_handler_error=on_error))
    return made[0]


@RINGS
@pytest.mark.parametrize("way", ["request", "batch", "kept"])
def test_complete0_answers_with_nothing_and_goes_on(ring: str, way: str, caplog: pytest.LogCaptureFixture) -> None:
    device = make_failing(way, "complete0")
    loopback, driver = bring_up(device, ring)
    with caplog.at_level(logging.ERROR, "virtio_test.device"):
        words = [b"one", b"bad", b"two"]
        requests = [driver.submit(0, [word], [3], publish=False) for word in words]
        driver.flush(0)
        answers = [each.wait() for each in requests]
        after = driver.submit(0, [b"end"], [3]).wait()
    # A batch fails as a whole: the device cannot know which row it was.
    assert answers == ([b""] * 3 if way == "batch" else [b"ONE", b"", b"TWO"])
    assert after == b"END"
    assert device.handler_errors == len(caplog.records) == 1
    assert caplog.records[0].exc_info is not None
    assert loopback.errors == []
    assert loopback.queue(0).in_flight == 0


@RINGS
@pytest.mark.parametrize("way", ["request", "batch", "kept"])
def test_broken_is_said_once_and_a_reset_helps(ring: str, way: str, caplog: pytest.LogCaptureFixture) -> None:
    device = make_failing(way, "broken")
    loopback, driver = bring_up(device, ring)
    with caplog.at_level(logging.ERROR, "virtio_test.device"):
        request = driver.submit(0, [b"bad"], [3])
        with pytest.raises(DeviceNeedsReset):
            request.wait()
    assert len(caplog.records) == 1
    (error,) = loopback.errors
    assert isinstance(error, HandlerError)
    assert isinstance(error.__cause__, RuntimeError)
    latched = loopback.queue(0).latched
    assert latched is not None
    assert latched.rule == "HandlerFailed"
    with pytest.raises(DeviceNeedsReset):
        driver.submit(0, [b"one"], [3])
    driver.initialize()
    assert driver.submit(0, [b"one"], [3]).wait() == b"ONE"
    assert len(loopback.errors) == 1


def test_keyboard_interrupt_is_no_error_of_the_handler(caplog: pytest.LogCaptureFixture) -> None:
    def interrupted(request: bytes) -> bytes:
        if request == b"stop":
            raise KeyboardInterrupt
        return request

    device = BaseDevice(7, handlers={0: interrupted})
    loopback, driver = bring_up(device)
    driver.submit(0, [b"stop"], [4])
    with pytest.raises(KeyboardInterrupt):
        loopback.loop.run_pending()
    assert caplog.records == []
    assert loopback.errors == []


def test_a_response_of_the_wrong_type_is_a_handler_error() -> None:
    device = BaseDevice(7, handlers={0: lambda _: 5})  # pyright: ignore[reportArgumentType]
    loopback, driver = bring_up(device)
    with pytest.raises(DeviceNeedsReset):
        driver.submit(0, [b"x"], [4]).wait()
    assert isinstance(loopback.errors[0], HandlerError)


@RINGS
def test_a_driver_that_breaks_a_rule_breaks_the_device_once(ring: str) -> None:
    device = BaseDevice(7, handlers={0: upper})
    loopback, driver = bring_up(device, ring)
    changes: list[int] = []
    loopback.listen(call=lambda _: None, config_changed=lambda: changes.append(loopback.read_status()))
    request = driver.submit(0, [b"abc"], [3], publish=False)
    driver.queues[0].publish()
    layout = driver.queues[0].layout()
    # The first descriptor now points where there is no memory.
    driver.memory.write(layout.at("desc.addr", 0), (1 << 50).to_bytes(8, "little"))
    loopback.kick_notifier(0, lambda: 0).notify()
    loopback.loop.run_pending()
    (error,) = loopback.errors
    assert isinstance(error, QueueViolation)
    assert error.queue == 0
    assert len(changes) == 1, "one notification"
    assert changes[0] & 0x40, "that shows DEVICE_NEEDS_RESET"
    for _ in range(3):
        loopback.kick_notifier(0, lambda: 0).notify()
        loopback.loop.run_pending()
    assert len(loopback.errors) == len(changes) == 1
    assert not request.done
    driver.initialize()
    assert request.done
    assert driver.submit(0, [b"abc"], [3]).wait() == b"ABC"


# --- kept chains -------------------------------------------------------------------------------------------


@RINGS
def test_kept_chains_complete_in_any_order_from_any_thread(ring: str) -> None:
    device = Keeper()
    loopback, driver = bring_up(device, ring)
    requests = [driver.submit(0, [bytes([number])], [1]) for number in range(20)]
    loopback.loop.run_pending()
    chains = device.kept
    assert [chain.read() for chain in chains] == [bytes([number]) for number in range(20)]
    results: list[bool] = []

    def work() -> None:
        results.extend(device.complete(chain, chain.read()) for chain in reversed(chains))

    thread = threading.Thread(target=work)
    thread.start()
    assert [each.wait() for each in requests] == [bytes([number]) for number in range(20)]
    thread.join()
    assert results == [True] * 20
    assert device.kept == []
    assert device.complete(chains[0], b"x") is False, "once"


def test_a_completion_that_does_not_fit_is_never_half_written() -> None:
    device = Keeper()
    loopback, driver = bring_up(device)
    request = driver.submit(0, [b"x"], [4])
    loopback.loop.run_pending()
    place = request.writable[0][0]
    driver.memory.write(place, b"....")
    assert device.complete(device.kept[0], b"12345")
    assert request.wait() == b""
    assert driver.memory.read(place, 4) == b"...."
    request = driver.submit(0, [b"x"], [4])
    loopback.loop.run_pending()
    device.kept[0].write(b"par")
    assert device.complete(device.kept[0], b"12345")
    assert request.wait() == b"", "what was written before does not count"


def test_a_completion_into_memory_that_has_gone() -> None:
    device = Keeper()
    loopback, driver = bring_up(device)
    driver.memory.add_region(1 << 30, 4096)
    request = driver.submit(0, [b"x"], [4])
    loopback.loop.run_pending()
    # The same in memory of its own, which the driver's side takes away.
    address = driver.queues[0].add([request.readable[0]], [(1 << 30, 4)])
    driver.queues[0].signal()
    loopback.loop.run_pending()
    driver.memory.remove_region(1 << 30, 4096)
    assert address >= 0
    assert device.complete(device.kept[1], b"gone")
    assert device.complete(device.kept[0], b"here")
    assert loopback.queue(0).counters.pushed == 2
    assert loopback.errors == []


@RINGS
def test_a_stopped_queue_gives_untouched_chains_back(ring: str) -> None:
    device = Keeper()
    loopback, driver = bring_up(device, ring)
    requests = [driver.submit(0, [bytes([number])], [1]) for number in range(4)]
    loopback.loop.run_pending()
    queue = loopback.queue(0)
    device.complete(device.kept[0], b"a")
    device.stop_queue(0)
    assert queue.in_flight == 0
    assert device.kept == []
    assert queue.counters.pushed == 1
    queue.resume()
    device.start_queue(queue)
    device.kicked(0)
    assert [chain.read() for chain in device.kept] == [b"\x01", b"\x02", b"\x03"], "offered again, in order"
    for chain in device.kept:
        device.complete(chain, b"b")
    assert [each.wait() for each in requests] == [b"a", b"b", b"b", b"b"]


@RINGS
def test_what_cannot_go_back_is_completed_with_nothing(ring: str) -> None:
    device = Keeper()
    loopback, driver = bring_up(device, ring)
    requests = [driver.submit(0, [bytes([number])], [1]) for number in range(3)]
    loopback.loop.run_pending()
    # The newest is done: the two before it cannot be offered again without offering this one twice.
    device.complete(device.kept[2], b"c")
    device.stop_queue(0)
    assert loopback.queue(0).in_flight == 0
    assert [each.wait() for each in requests] == [b"", b"", b"c"]


def test_a_touched_chain_is_waited_for() -> None:
    device = Keeper(cancel_seconds=30)
    loopback, driver = bring_up(device)
    request = driver.submit(0, [b"x"], [4])
    loopback.loop.run_pending()
    (chain,) = device.kept
    chain.write(b"par")
    worker = threading.Timer(0.05, device.complete, (chain, b"part"))
    worker.start()
    device.stop_queue(0)
    worker.join()
    assert request.wait() == b"part"
    assert loopback.errors == []


def test_what_is_never_completed_latches_the_queue() -> None:
    device = Keeper(cancel_seconds=0.05)
    device.lets_go = lambda _: False
    loopback, driver = bring_up(device)
    request = driver.submit(0, [b"x"], [4])
    loopback.loop.run_pending()
    (chain,) = device.kept
    device.stop_queue(0)
    latched = loopback.queue(0).latched
    assert latched is not None
    assert latched.rule == "DeviceStuck"
    assert len(loopback.errors) == 1
    assert device.complete(chain, b"late") is False
    with pytest.raises(DeviceNeedsReset):
        request.wait()


def test_a_reset_drops_kept_chains() -> None:
    device = Keeper()
    loopback, driver = bring_up(device)
    request = driver.submit(0, [b"x"], [4])
    loopback.loop.run_pending()
    (chain,) = device.kept
    place = request.writable[0][0]
    driver.memory.write(place, b"....")
    driver.reset()
    assert device.kept == []
    assert device.complete(chain, b"late") is False
    assert driver.memory.read(place, 4) == b"...."


# --- state and configuration -------------------------------------------------------------------------------


def configured() -> BaseDevice:
    layout = ConfigLayout(("size", "le32"), ("mode", "u8", "rw"), ("name", "bytes(4)"))
    return BaseDevice(7, handlers={0: upper}, config=ConfigSpace(layout, size=5, name=b"abcd"))


def test_state_goes_round() -> None:
    device, other = configured(), configured()
    device.config.update(size=77)
    device.config.write(4, b"\x03")
    other.restore(device.save())
    assert other.config == device.config
    assert (other.config["size"], other.config["mode"]) == (77, 3)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"version": True},
        {"version": "1"},
        {"device_id": 8},
        {"config": {}},
        {"config": None},
        {"more": 1},
    ],
)
def test_a_bad_state_changes_nothing(change: dict[str, object]) -> None:
    device = configured()
    before = device.save()
    state = {**configured().save(), **change}
    with pytest.raises(SavedStateError):
        device.restore(state)
    for name in before:
        with pytest.raises(SavedStateError):
            device.restore({key: value for key, value in before.items() if key != name})
    assert device.save() == before


def test_a_changed_field_notifies_by_itself_when_live() -> None:
    device = configured()
    loopback = Loopback(device)
    device.config.update(size=6)
    seen: list[int | bytes] = []

    class Listener(Driver):
        def config_changed(self) -> None:
            seen.append(self.read_field("size"))

    driver = Listener(loopback, layout=device.config.layout)
    driver.initialize()
    loopback.loop.run_pending()
    assert seen == [], "what changed before the driver was live is no change to it"
    device.config.update(size=7)
    device.config.update(size=8)
    loopback.loop.run_pending()
    assert seen == [8], "one notification may stand for several changes"
    driver.reset()
    device.config.update(size=9)
    loopback.loop.run_pending()
    assert seen == [8]


def test_a_queue_beyond_the_device_is_refused() -> None:
    device = BaseDevice(7, handlers={0: upper}, queue_sizes=(8,))
    loopback, _ = bring_up(device)
    with pytest.raises(InvalidArgument):
        loopback.enable_queue(QueueConfig(8, desc=0, driver=4096, device=8192, index=1))
    with pytest.raises(InvalidArgument):
        device.start_queue(bring_up(BaseDevice(7, handlers={0: upper, 1: upper}))[0].queue(1))
