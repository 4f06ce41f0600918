"""The loopback: its registers, its rules for a broken device, and a saved state in the middle of everything."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtio_test._core import Chain, GuestMemory, Policy, QueueConfig, RingLayout
from virtio_test.carrier.loopback import Loopback
from virtio_test.clock import VirtualClock
from virtio_test.config import ConfigLayout, ConfigSpace
from virtio_test.device import RING_FEATURES, Bus
from virtio_test.devices.base import BaseDevice, kept
from virtio_test.devices.test import TestDevice
from virtio_test.driver.base import Driver
from virtio_test.driver.registers import Registers
from virtio_test.driver.request import Request
from virtio_test.driver.test import TestDriver
from virtio_test.errors import (
    DeviceNeedsReset,
    InvalidArgument,
    NoFeature,
    QueueViolation,
    SavedStateError,
    StateError,
    StatusViolation,
)
from virtio_test.features import FeatureSet
from virtio_test.loop import OwnerLoop
from virtio_test.spec.status import Status

from .world import open_fds

Ring = Literal["split", "packed"]
RINGS = pytest.mark.parametrize("ring", ["split", "packed"])
READY = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK
LIVE = READY | Status.DRIVER_OK


def features(ring: Ring) -> FeatureSet:
    return RING_FEATURES if ring == "packed" else RING_FEATURES - FeatureSet("RING_PACKED")


def echo(request: bytes) -> bytes:
    return request


def keeper() -> BaseDevice:
    return BaseDevice(7, handlers={0: kept(lambda _: None)}, queue_sizes=(16,))


def ready(loopback: Loopback, *, bits: int | None = None) -> None:
    """As a driver that has come as far as FEATURES_OK."""
    loopback.write_status(Status.ACKNOWLEDGE)
    loopback.write_status(Status.ACKNOWLEDGE | Status.DRIVER)
    loopback.write_driver_features(FeatureSet("VERSION_1").bits if bits is None else bits)
    loopback.write_status(READY)


# --- registers ---------------------------------------------------------------------------------------------


def test_both_faces() -> None:
    loopback = Loopback(TestDevice())
    assert isinstance(loopback, Registers)
    assert isinstance(loopback.bank, Bus)
    assert loopback.device_id() == 45
    assert loopback.queue_max_sizes() == [128]
    assert FeatureSet.from_bits(loopback.device_features()) == TestDevice().features


def test_what_is_offered() -> None:
    offered = TestDevice().features - FeatureSet("RING_PACKED")
    driver = TestDriver(Loopback(TestDevice(), offered=offered))
    assert "RING_PACKED" not in driver.initialize()
    with pytest.raises(InvalidArgument, match="SR_IOV"):
        Loopback(TestDevice(), offered=TestDevice().features | FeatureSet("SR_IOV"))
    with pytest.raises(InvalidArgument, match="VERSION_1"):
        Loopback(TestDevice(), offered=FeatureSet())


@pytest.mark.parametrize("bits", [0, 1 << 50, FeatureSet("RING_PACKED").bits])
def test_bad_features_leave_features_ok_clear(bits: int) -> None:
    loopback = Loopback(TestDevice())
    ready(loopback, bits=bits)
    assert loopback.read_status() == Status.ACKNOWLEDGE | Status.DRIVER
    assert isinstance(loopback.errors[-1], StatusViolation)


def test_features_are_frozen_by_features_ok() -> None:
    loopback = Loopback(device := TestDevice())
    ready(loopback)
    loopback.write_driver_features(device.features.bits)
    loopback.write_status(LIVE)
    assert device.negotiated == FeatureSet("VERSION_1")


def test_driver_ok_needs_features_ok() -> None:
    loopback = Loopback(device := TestDevice())
    loopback.write_status(Status.DRIVER_OK)
    assert not device.active
    assert not loopback.read_status() & Status.DRIVER_OK


def test_queues_come_after_features_ok_and_once() -> None:
    loopback = Loopback(BaseDevice(7, handlers={0: echo}, queue_sizes=(8,)))
    config = QueueConfig.from_layout(RingLayout.contiguous(8, 0x1000))
    with pytest.raises(StateError, match="FEATURES_OK"):
        loopback.enable_queue(config)
    ready(loopback)
    loopback.enable_queue(config)
    with pytest.raises(StateError, match="enabled already"):
        loopback.enable_queue(config)
    with pytest.raises(InvalidArgument):
        loopback.enable_queue(QueueConfig.from_layout(RingLayout.contiguous(8, 0x1000), index=1))
    loopback.write_status(0)
    ready(loopback)
    with pytest.raises(InvalidArgument):
        loopback.enable_queue(QueueConfig.from_layout(RingLayout.contiguous(16, 0x1000)))
    with pytest.raises(StateError, match="not enabled"):
        loopback.queue(0)


@pytest.mark.parametrize(
    "place", [{"desc": 0x1001}, {"driver": 0x2001}, {"device": 0x3002}, {"desc": 1 << 40}, {"device": (16 << 20) - 4}]
)
def test_an_impossible_queue_breaks_the_device(place: dict[str, int]) -> None:
    loopback = Loopback(BaseDevice(7, handlers={0: echo}, queue_sizes=(8,)))
    changes: list[int] = []
    loopback.listen(call=lambda _: None, config_changed=lambda: changes.append(1))
    ready(loopback)
    areas = {"desc": 0x1000, "driver": 0x2000, "device": 0x3000, **place}
    config = QueueConfig(8, desc=areas["desc"], driver=areas["driver"], device=areas["device"])
    loopback.enable_queue(config)
    loopback.loop.run_pending()
    assert loopback.read_status() & Status.DEVICE_NEEDS_RESET
    assert isinstance(loopback.errors[-1], QueueViolation)
    assert changes == [], "no notification before DRIVER_OK (2.1.2)"
    loopback.write_status(0)
    assert loopback.read_status() == 0
    driver = Driver(loopback)
    driver.initialize()
    assert driver.submit(0, [b"x"], [1]).wait() == b"x"


@RINGS
def test_an_early_kick_is_not_lost(ring: Ring) -> None:
    handled: list[bytes] = []

    def note(request: bytes) -> bytes:
        handled.append(request)
        return request

    class Eager(Driver):
        def set_up(self) -> None:
            self.submit(0, [b"early"], [5], publish=False)
            self.queues[0].signal()
            self.loop.run_pending()
            assert handled == [], "nothing is processed before DRIVER_OK"

    driver = Eager(Loopback(BaseDevice(7, handlers={0: note})), wanted=features(ring))
    driver.initialize()
    (request,) = driver.in_flight
    assert request.wait() == b"early"
    assert handled == [b"early"]


@pytest.mark.row("A17")
def test_kicks_for_queues_that_are_not_there_are_ignored() -> None:
    loopback = Loopback(TestDevice())
    for index in (0, 1, 65535):
        loopback.kick_notifier(index, lambda: 0).notify()
    loopback.loop.run_pending()
    assert loopback.errors == []


def test_failed_stops_the_queues() -> None:
    handled: list[bytes] = []
    loopback = Loopback(BaseDevice(7, handlers={0: handled.append}))
    driver = Driver(loopback)
    driver.initialize()
    driver.submit(0, [b"x"])
    loopback.write_status(LIVE | Status.FAILED)
    loopback.loop.run_pending()
    assert handled == []
    driver.initialize()
    driver.submit(0, [b"y"]).wait()
    assert handled == [b"y"]


@pytest.mark.row("D08")
def test_a_reset_in_the_middle_leaves_no_marks() -> None:
    calls: list[int] = []
    loopback = Loopback(BaseDevice(7, handlers={0: echo}))
    driver = Driver(loopback)
    driver.initialize()
    driver.submit(0, [b"x"])
    loopback.listen(call=calls.append, config_changed=lambda: calls.append(-1))
    loopback.bank.call(0)
    loopback.bank.config_changed()
    loopback.write_status(0)
    loopback.loop.run_pending()
    assert calls == []


def test_policies() -> None:
    for policy, broken in ((Policy.interop, False), (Policy.strict, True)):
        loopback = Loopback(BaseDevice(7, handlers={0: echo}), policy=policy)
        driver = Driver(loopback, wanted=FeatureSet("VERSION_1"))
        driver.initialize()
        driver.submit(0, [b"abc"], [3], publish=False)
        # An empty descriptor in front of the response (robustness catalogue, B01).
        driver.memory.write(driver.queues[0].layout().at("desc.len", 0), bytes(4))
        driver.flush(0)
        loopback.loop.run_pending()
        assert bool(loopback.read_status() & Status.DEVICE_NEEDS_RESET) == broken


@RINGS
def test_ten_thousand_requests_leave_nothing_behind(ring: Ring) -> None:
    lines = [0]

    def count(_line: str) -> None:
        lines[0] += 1

    loopback = Loopback(TestDevice(console=count))
    driver = TestDriver(loopback, wanted=features(ring), console=count)
    driver.initialize()
    before = driver.arena.used
    answers = driver.request_many(number % 256 for number in range(10_000))
    assert len(answers) == 10_000
    assert lines[0] == 90_000
    assert driver.arena.used == before
    assert loopback.queue(0).in_flight == driver.queues[0].in_flight == 0
    assert loopback.queue(0).counters.pushed == 10_000


@pytest.mark.parametrize("detach", [False, True])
def test_what_is_thrown_away_is_gone(detach: bool) -> None:
    # Loopback, queues and notifiers refer to each other through the core; the collector must see through it.
    def one() -> weakref.ref[Loopback]:
        loopback = Loopback(TestDevice(timer=True, console=lambda _: None))
        driver = TestDriver(loopback, timer=True, console=lambda _: None)
        driver.initialize()
        loopback.loop.run(until=lambda: driver.acknowledged == 2)
        if detach:
            driver.detach()
        return weakref.ref(loopback)

    before = open_fds()
    made = [one() for _ in range(20)]
    gc.collect()
    assert [each() for each in made] == [None] * 20
    assert open_fds() == before


# --- reset of one queue ------------------------------------------------------------------------------------


def test_queue_reset_rules() -> None:
    loopback = Loopback(BaseDevice(7, handlers={0: echo}))
    ready(loopback)
    with pytest.raises(NoFeature):
        loopback.reset_queue(0)
    loopback.write_status(0)
    ready(loopback, bits=FeatureSet("VERSION_1", "RING_RESET").bits)
    with pytest.raises(InvalidArgument, match="not enabled"):
        loopback.reset_queue(0)


class Generous(BaseDevice):
    """Lets go of every chain, touched or not."""

    def __init__(self) -> None:
        super().__init__(7, handlers={0: kept(lambda _: None), 1: kept(lambda _: None)})

    def cancel(self, chain: Chain) -> bool:
        return chain.writable >= 0


@pytest.mark.row("Q13")
@RINGS
@pytest.mark.parametrize("written", [b"", b"par"])
def test_a_queue_that_is_reset_writes_nothing_any_more(ring: Ring, written: bytes) -> None:
    loopback = Loopback(device := Generous())
    driver = Driver(loopback, wanted=features(ring))
    driver.initialize()
    driver.submit(0, [b"x"], [4])
    loopback.loop.run_pending()
    (chain,) = device.kept
    chain.write(written)
    layout = loopback.queue(0).layout()
    areas = (
        (layout.desc, layout.desc_bytes),
        (layout.driver, layout.driver_bytes),
        (layout.device, layout.device_bytes),
    )
    before = [driver.memory.read(*area) for area in areas]
    loopback.reset_queue(0)
    assert [driver.memory.read(*area) for area in areas] == before
    assert device.complete(chain, b"late") is False


@pytest.mark.row("N07")
@RINGS
def test_in_a_broken_device_no_queue_writes_any_more(ring: Ring) -> None:
    calls: list[int] = []
    loopback = Loopback(device := Generous())
    driver = Driver(loopback, wanted=features(ring))
    driver.initialize()
    request = driver.submit(1, [b"x"], [4])
    loopback.loop.run_pending()
    loopback.listen(call=calls.append, config_changed=lambda: None)
    (chain,) = device.kept
    place = request.writable[0][0]
    driver.memory.write(place, b"....")
    loopback.bank.broken(RuntimeError("queue 0 was to blame"))
    assert device.complete(chain, b"late") is False
    loopback.loop.run_pending()
    assert driver.memory.read(place, 4) == b"...."
    assert calls == []


# --- saved state -------------------------------------------------------------------------------------------


def through_json(state: dict[str, object]) -> dict[str, Any]:
    return json.loads(json.dumps(state))


@RINGS
def test_a_device_is_replaced_under_a_driver_that_notices_nothing(ring: Ring) -> None:
    device = keeper()
    loopback = Loopback(device)
    driver = Driver(loopback, wanted=features(ring))
    driver.initialize()
    for number in range(40):  # so that indices and wrap counters are no longer fresh
        request = driver.submit(0, [bytes([number])], [1])
        loopback.loop.run_pending()
        device.complete(device.kept[0], b"a")
        assert request.wait() == b"a"
    waiting = [driver.submit(0, [bytes([number])], [1]) for number in range(5)]
    loopback.loop.run_pending()
    assert len(device.kept) == 5
    late = driver.submit(0, [b"late"], [1])
    other = keeper()
    loopback.restore(through_json(loopback.save()), device=other)
    loopback.loop.run_pending()
    assert device.kept == []
    assert [chain.read() for chain in other.kept] == [b"\0", b"\1", b"\2", b"\3", b"\4", b"late"]
    for chain in other.kept:
        other.complete(chain, b"b")
    assert [each.wait() for each in (*waiting, late)] == [b"b"] * 6
    assert loopback.errors == []


@pytest.mark.row("R10")
def test_a_used_buffer_that_was_not_told_is_told_after_the_restore() -> None:
    loopback = Loopback(BaseDevice(7, handlers={0: echo}))
    driver = Driver(loopback)
    driver.initialize()
    request = driver.submit(0, [b"x"], [1])
    loopback.device.kicked(0)
    loopback.loop.unpend((loopback, "kick", 0))
    loopback.loop.unpend((loopback, "call", 0))
    loopback.restore(through_json(loopback.save()))
    assert request.wait() == b"x"


def test_the_timer_moves_with_the_state() -> None:
    lines: list[str] = []
    clock = VirtualClock()
    loopback = Loopback(TestDevice(timer=True, console=lines.append), loop=OwnerLoop(clock=clock))
    driver = TestDriver(loopback, timer=True, console=lambda _: None)
    driver.initialize()
    clock.advance(30.4)
    loopback.loop.run_pending()
    moved = TestDevice(timer=True, console=lambda line: lines.append(f"moved {line}"))
    loopback.restore(through_json(loopback.save()), device=moved)
    clock.advance(0.7)
    loopback.loop.run_pending()
    assert lines == [
        "==============set config:0",
        "=========get virtio num:1",
        "moved ==============set config:1",
        "moved =========get virtio num:2",
    ], "the old device ticks no more"


def test_a_device_whose_reset_forgets_is_restored_all_the_same() -> None:
    class Forgetful(BaseDevice):
        def reset(self) -> None:
            super().reset()
            self.config.update(level=0)

    device = Forgetful(7, handlers={0: echo}, config=ConfigSpace(ConfigLayout(("level", "le32"))))
    loopback = Loopback(device)
    driver = Driver(loopback, layout=device.config.layout)
    driver.initialize()
    device.config.update(level=5)
    state = through_json(loopback.save())
    device.config.update(level=6)
    loopback.restore(state)
    assert driver.read_field("level") == 5


def test_saving_changes_nothing() -> None:
    loopback = Loopback(TestDevice(console=lambda _: None))
    driver = TestDriver(loopback, console=lambda _: None)
    driver.initialize()
    driver.request(1)
    before = loopback.save()
    assert loopback.save() == before
    assert driver.request(2).ret == 103
    assert loopback.errors == []


@pytest.mark.parametrize("status", [0, int(READY)])
def test_a_device_without_a_live_driver_is_saved_too(status: int) -> None:
    loopback = Loopback(TestDevice())
    if status:
        ready(loopback)
    state = through_json(loopback.save())
    loopback.write_status(0)
    loopback.restore(state)
    assert loopback.read_status() == status
    driver = TestDriver(loopback, console=lambda _: None)
    driver.initialize()


def queue_twice(state: dict[str, Any]) -> None:
    state["queues"].append(state["queues"][0])


def fewer_features_and_a_bad_device(state: dict[str, Any]) -> None:
    state["features"] &= ~FeatureSet("EVENT_IDX").bits
    state["device"]["ticks"] = -1


def without_device(state: dict[str, Any]) -> None:
    del state["device"]


def change(path: tuple[str | int, ...], *, to: object) -> Callable[[dict[str, Any]], None]:
    def apply(state: dict[str, Any]) -> None:
        at: Any = state
        for step in path[:-1]:
            at = at[step]
        at[path[-1]] = to

    return apply


@pytest.mark.parametrize(
    "spoil",
    [
        change(("version",), to=1),
        change(("version",), to=True),
        change(("more",), to=1),
        change(("status",), to=0x20),
        change(("status",), to="15"),
        change(("status",), to=int(Status.DRIVER_OK)),
        change(("features",), to=-1),
        change(("features",), to=None),
        change(("features",), to=1 << 60),
        change(("queues",), to={}),
        change(("queues", 0), to=None),
        change(("queues", 0, "index"), to=1),
        change(("queues", 0, "size"), to=0),
        change(("queues", 0, "size"), to=100),
        change(("queues", 0, "size"), to=256),
        change(("queues", 0, "desc"), to=1),
        change(("queues", 0, "desc"), to=1 << 63),
        change(("queues", 0, "device"), to=-1),
        change(("queues", 0, "avail"), to=1 << 16),
        change(("queues", 0, "avail"), to=0x4000),
        change(("queues", 0, "used"), to=True),
        change(("queues", 0, "more"), to=1),
        change(("device",), to=None),
        change(("device", "ticks"), to=-1),
        change(("device", "config"), to={}),
        queue_twice,
        without_device,
        fewer_features_and_a_bad_device,
    ],
)
def test_a_bad_state_changes_nothing(spoil: Callable[[dict[str, Any]], None]) -> None:
    loopback = Loopback(TestDevice(console=lambda _: None))
    driver = TestDriver(loopback, wanted=features("split"), console=lambda _: None)
    driver.initialize()
    driver.request(1)
    before = loopback.save()
    state = through_json(before)
    spoil(state)
    with pytest.raises(SavedStateError):
        loopback.restore(state)
    assert loopback.save() == before
    assert driver.request(10).ret == 111
    assert loopback.errors == []


@RINGS
@given(steps=st.lists(st.sampled_from(["submit", "run", "complete", "move", "queue", "break", "reset"]), max_size=40))
def test_whatever_happens_every_request_ends_once(ring: Ring, steps: list[str]) -> None:
    loopback = Loopback(keeper(), memory=MEMORY)
    driver = Driver(loopback, wanted=features(ring))
    driver.initialize()
    ends: list[Request] = []
    sent: dict[int, Request] = {}
    answers: dict[int, bytes] = {}
    for number, step in enumerate(steps):
        device = loopback.device
        assert isinstance(device, BaseDevice)
        if step == "submit" and driver.live and len(driver.in_flight) < 8:
            sent[number] = driver.submit(0, [bytes([number])], [4], on_done=ends.append)
        elif step == "run":
            loopback.loop.run_pending()
        elif step == "complete" and device.kept:
            chain = device.kept[number % len(device.kept)]
            answer = bytes([number]) * (1 + number % 4)
            if loopback.queue(0).latched is not None:
                assert not device.complete(chain, answer)
            else:
                answers[chain.read()[0]] = answer
                assert device.complete(chain, answer)
        elif step == "move":
            loopback.restore(through_json(loopback.save()), device=keeper())
        elif step == "queue" and driver.live:
            loopback.loop.run_pending()
            driver.reset_queue(0)
        elif step == "break":
            loopback.bank.broken(RuntimeError("on purpose"))
            loopback.loop.run_pending()
        elif step == "reset":
            loopback.loop.run_pending()
            driver.initialize()
    loopback.loop.run_pending()
    assert all(not isinstance(error, QueueViolation) for error in loopback.errors)
    lost = driver.detach()
    assert all(isinstance(each.error, StateError) for each in lost)
    assert sorted(each.token for each in ends) == sorted(each.token for each in sent.values())
    assert {id(each) for each in ends} == {id(each) for each in sent.values()}, "each once"
    for number, request in sent.items():
        if request.error is not None:
            assert isinstance(request.error, StateError | DeviceNeedsReset)
        elif request.data != answers.get(number):
            # Its queue stopped while a later chain was answered already: it could not be offered again.
            assert request.data == b""
            assert "move" in steps
    assert driver.arena.used == 0


MEMORY = GuestMemory([(0, 1 << 20)])
