"""Saved states that somebody has made to hurt: they end in one short typed line, and in no state that cannot be."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
from virtio_test._core import DriverQueue, QueueConfig, RingLayout
from virtio_test.carrier.loopback import Loopback
from virtio_test.carrier.pci import PciLoopback
from virtio_test.clock import to_nanoseconds
from virtio_test.config import ConfigLayout, ConfigSpace
from virtio_test.console import shown
from virtio_test.devices.base import BaseDevice, kept
from virtio_test.devices.blk import BlkDevice
from virtio_test.devices.console import ConsoleDevice
from virtio_test.devices.rng import RngDevice
from virtio_test.devices.test import TestDevice
from virtio_test.driver.base import Driver
from virtio_test.driver.pci import open_pci
from virtio_test.errors import InvalidArgument, SavedStateError
from virtio_test.features import FeatureSet
from virtio_test.transport import saved
from virtio_test.transport.mmio import VirtioMmio
from virtio_test.transport.pci.function import VirtioPci

from tests.property.test_saved_state import places
from tests.unit.test_saved_state import LAYOUT, echo, through_json
from tests.unit.ways import WAYS, Way, features, reach

NO_DIGITS = 10**5000
"""Python refuses to write it in decimal."""


def nested(levels: int) -> object:
    value: object = []
    for _ in range(levels):
        value = [value]
    return value


NASTY: dict[str, object] = {
    "an integer beyond every float": 10**400,
    "an integer without digits": NO_DIGITS,
    "no number": float("nan"),
    "infinity": float("inf"),
    "a long text": "0" * 3000,
    "half a character": "\ud800",
    "a long list": [0] * 3000,
    "a deep list": nested(1500),
    "keys of all kinds": {1: 2, "a": 3},
    "bytes": b"",
}

DEVICES = {
    "timer": lambda: TestDevice(timer=True, console=lambda _: None),
    "blk": lambda: BlkDevice(bytearray(4096)),
    "console": lambda: ConsoleDevice(lambda _: None),
    "rng": RngDevice,
}


@pytest.mark.row("R07")
@WAYS
@pytest.mark.parametrize("name", DEVICES)
def test_no_value_anywhere_is_more_than_a_short_refusal(name: str, way: str) -> None:
    over = reach(DEVICES[name](), way)
    Driver(over.registers).initialize()
    good = through_json(over.side.save())
    told: list[str] = []
    for path in places(good):
        for value in NASTY.values():
            state: Any = copy.deepcopy(good) if path else value
            at = state
            for step in path[:-1]:
                at = at[step]
            if path:
                at[path[-1]] = value
            before = through_json(over.side.save())
            try:
                over.side.restore(state)
            except SavedStateError as error:
                told.append(str(error))
                assert through_json(over.side.save()) == before
    assert len(told) > 200
    assert max(map(len, told)) < 1000


@pytest.mark.parametrize(
    ("value", "text"),
    [
        pytest.param("a", "'a'", id="text"),
        pytest.param(NO_DIGITS, "<int>", id="no digits"),
        pytest.param(nested(100_000), "<list>", id="deep"),
        pytest.param([0] * 30, "[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,...", id="long"),
    ],
)
def test_a_value_in_a_line(value: object, text: str) -> None:
    assert shown(value) == text


@pytest.mark.parametrize(
    "name", ["an integer beyond every float", "an integer without digits", "no number", "infinity"]
)
def test_a_time_that_is_none_is_misuse(name: str) -> None:
    with pytest.raises(InvalidArgument):
        to_nanoseconds(NASTY[name])  # type: ignore[arg-type]


# --- what the transport has not --------------------------------------------------------------------------------------


def plain(**options: Any) -> BaseDevice:
    return BaseDevice(7, handlers={0: kept(lambda _: None)}, queue_sizes=(16,), config=ConfigSpace(LAYOUT), **options)


@pytest.mark.row("R08")
@WAYS
def test_no_state_brings_a_legacy_interface_to_where_none_is(way: str) -> None:
    """A device without legacy rules would be activated without VERSION_1."""
    over = reach(plain(transitional=False), way)
    state: Any = through_json(over.side.save())
    bank = state if way == "in process" else state["bank"]
    bank.update(interface="legacy", status=0x0F, features=0)
    with pytest.raises(SavedStateError, match="interface is 'legacy', here is modern"):
        over.side.restore(state)
    assert not over.bank.legacy


@pytest.mark.row("R08")
def test_a_legacy_page_has_no_other_interface() -> None:
    page = VirtioMmio(plain(), version=1)
    state: Any = through_json(page.save())
    state["bank"]["interface"] = "modern"
    with pytest.raises(SavedStateError, match="interface is 'modern', here is legacy"):
        page.restore(state)


@pytest.mark.row("R08")
def test_a_legacy_interface_has_its_own_features_only() -> None:
    side = VirtioPci(echo(), flavour="transitional")
    Driver(open_pci(PciLoopback(side), interface="legacy"), layout=LAYOUT).initialize()
    state: Any = through_json(side.save())
    state["bank"]["features"] |= 1 << 32
    with pytest.raises(SavedStateError, match="legacy interface does not offer 0x100000000"):
        side.restore(state)


@pytest.mark.row("R08")
@WAYS
def test_a_device_that_cannot_do_what_is_offered(way: str) -> None:
    """It would be activated with it after the next reset."""
    over = reach(plain(features=FeatureSet("EXTRA", device={"EXTRA": 5})), way)
    before = through_json(over.side.save())
    with pytest.raises(SavedStateError, match="is offered here"):
        over.side.restore(copy.deepcopy(before), device=plain())
    assert through_json(over.side.save()) == before


# --- which parts of a queue hang on which status ---------------------------------------------------------------------


def running(ring: str = "split") -> tuple[Way, dict[str, Any]]:
    """A device whose driver runs one queue, and what it saves."""
    over = reach(echo(), "in process")
    Driver(over.registers, wanted=features(ring), layout=LAYOUT).initialize()
    state = through_json(over.side.save())
    assert state["queues"][0]["avail"] is not None
    return over, state


@pytest.mark.row("R03", "R09")
@pytest.mark.parametrize(
    ("status", "enabled"),
    [
        pytest.param(0x0F, False, id="set up and not enabled"),
        pytest.param(0x0B, True, id="before DRIVER_OK"),
        pytest.param(0x4F, True, id="broken"),
    ],
)
def test_a_queue_that_does_not_run_has_no_position(status: int, *, enabled: bool) -> None:
    over, state = running()
    state["status"] = status
    state["queues"][0].update(enabled=enabled, avail=None, used=None)
    over.side.restore(state)
    assert over.bank.status.value == status
    assert through_json(over.side.save())["queues"][0]["avail"] is None


@pytest.mark.row("R03", "R09")
@pytest.mark.parametrize(("status", "enabled"), [(0x03, True), (0x0F, False)])
def test_a_queue_that_cannot_run_has_no_position(status: int, *, enabled: bool) -> None:
    over, state = running()
    state["status"] = status
    state["queues"][0]["enabled"] = enabled
    with pytest.raises(SavedStateError, match="has a position, and is not enabled"):
        over.side.restore(state)


@pytest.mark.row("R01")
@pytest.mark.parametrize("ring", ["split", "packed"])
def test_only_a_packed_ring_has_any_size(ring: str) -> None:
    over, state = running(ring)
    state["queues"][0].update(size=5, enabled=False, avail=None, used=None)
    if ring == "packed":
        over.side.restore(state)
        assert through_json(over.side.save())["queues"][0]["size"] == 5
    else:
        with pytest.raises(SavedStateError, match="is 5, which no queue of this format has"):
            over.side.restore(state)


def test_a_queue_that_nobody_wrote_to_is_not_saved() -> None:
    assert through_json(VirtioMmio(echo()).save())["bank"]["queues"] == []


@pytest.mark.row("R08")
def test_features_of_a_legacy_driver_count_once_it_stands_by_them() -> None:
    """Until then it may have written any."""
    side = VirtioPci(echo(), flavour="transitional")
    state: Any = through_json(side.save())
    state["bank"].update(interface="legacy", status=0x03, features=1 << 23)
    side.restore(state)
    assert through_json(side.save())["bank"]["features"] == 1 << 23


def test_true_is_no_version() -> None:
    saved.version(1, 1)
    with pytest.raises(SavedStateError, match="version True, this is version 1"):
        saved.version(True, 1)  # noqa: FBT003 - what JSON calls true


@pytest.mark.row("R08")
def test_a_device_is_suspended_where_that_was_negotiated() -> None:
    suspend = FeatureSet("SUSPEND")
    over = reach(echo(), "in process", more=suspend)
    Driver(over.registers, wanted=features("split") | suspend, layout=LAYOUT).initialize()
    state: Any = {**through_json(over.side.save()), "status": 0x1B}
    over.side.restore(state)
    assert over.bank.status.value == 0x1B
    state["features"] &= ~suspend.bits
    with pytest.raises(SavedStateError, match="SUSPEND was not negotiated"):
        over.side.restore(state)
    assert over.bank.status.value == 0x1B


@pytest.mark.parametrize("value", [0, 1])
def test_true_is_no_number(value: int) -> None:
    assert saved.number(value, "size", 1) == value
    with pytest.raises(SavedStateError, match="not a number from 0 to 0x1"):
        saved.number(bool(value), "size", 1)
    for wrong in (2, -1, 1.0, None):
        with pytest.raises(SavedStateError, match="not a number from 0 to 0x1"):
            saved.number(wrong, "size", 1)


class Own(BaseDevice):
    """A device with a part of its own, which it takes as it is."""

    def save(self) -> dict[str, object]:
        return {"own": getattr(self, "own", None)}

    def check_state(self, state: Mapping[str, object]) -> None:
        pass

    def restore(self, state: Mapping[str, object]) -> None:
        self.own = state["own"]


@pytest.mark.parametrize("value", [None, True, 1, 1.5, "a", [None, [1]], {"a": None}])
def test_a_device_may_save_what_json_has(value: object) -> None:
    device = Own(7, handlers={}, queue_sizes=())
    side = Loopback(device)
    side.restore({**side.save(), "device": {"own": value}})
    assert side.save()["device"] == {"own": value}
    for wrong in (b"", (1,), {1: 2}):
        with pytest.raises(SavedStateError, match=r"no JSON value|no text"):
            side.restore({**side.save(), "device": {"own": [value, wrong]}})


# --- what a driver would not be told --------------------------------------------------------------------------------


@pytest.mark.row("R12")
def test_a_legacy_driver_that_waits_before_driver_ok_is_answered_after_the_restore() -> None:
    device = plain()
    page = VirtioMmio(device, version=1)
    for offset, value in ((0x028, 4096), (0x070, 3), (0x020, 0), (0x030, 0), (0x040, 5)):
        page.write(offset, value.to_bytes(4, "little"))
    layout = RingLayout.legacy(16, 5 * 4096)
    queue = DriverQueue(page.memory, QueueConfig.from_layout(layout))
    queue.add([], [(0x10000, 1)])
    queue.publish()
    page.write(0x050, bytes(4))
    page.loop.run_pending()
    assert len(device.kept) == 1
    state = through_json(page.save())
    other = plain()
    page.restore(state, device=other)
    page.loop.run_pending()
    other.complete(other.kept[0], b"y")
    used = queue.get_used()
    assert used is not None
    assert page.memory.read(0x10000, 1) == b"y"


@pytest.mark.row("R12")
@pytest.mark.parametrize(
    ("saved", "present"), [(5, 260), (255, 0), (0xFFFF_FFFF, 0), (0xFFFF_FFFF, 1), (3, 3), (260, 5)]
)
def test_a_driver_sees_a_generation_that_it_has_not_seen(saved: int, present: int) -> None:
    space = ConfigSpace(ConfigLayout(("level", "le32")))

    for _ in range(present):
        space.read(0, 4)
        space.level += 1
    assert space.generation == present
    space.restore({"version": 1, "generation": saved, "values": {"level": 0}})
    assert space.generation not in (saved, present)
    assert space.generation_u8 not in (saved & 0xFF, present & 0xFF)


@pytest.mark.row("R07")
@pytest.mark.parametrize(
    "messages",
    [
        ["0900000001000000"],
        ["0000000063000000"],
        ["0000000006000000", "0000000006000100"],
        [number.to_bytes(4, "little").hex() + "01000000" for number in range(10_000)],
    ],
    ids=["a port that is not there", "an event that is none", "one twice", "ten thousand"],
)
def test_a_console_keeps_no_messages_that_it_would_not_say(messages: list[str]) -> None:
    device = ConsoleDevice(lambda _: None)
    state: dict[str, Any] = device.save()
    device.restore({**state, "messages": ["0000000006000100"]})
    with pytest.raises(SavedStateError):
        device.restore({**state, "messages": messages})
