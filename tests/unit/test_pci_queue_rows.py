"""The rows Q01 to Q16 and D01 to D17 of the robustness catalogue, as the PCI function shows them."""

from __future__ import annotations

from importlib import import_module

import pytest
from virtio_test._core import RingLayout
from virtio_test.devices.base import kept
from virtio_test.features import FeatureSet
from virtio_test.spec.pci import COMMON
from virtio_test.transport.slot import QueueSlot

from .pci_world import BASE, LIVE, MEMORY, READY, ROWS, SIZE, UP, S, World, row, upper

EXPECTED = {
    *(f"X{number:02}" for number in range(1, 17) if number != 9),
    *(f"Q{number:02}" for number in range(1, 17)),
    *(f"D{number:02}" for number in range(1, 18)),
    "A17",
    "A18",
}


def test_every_row_has_a_case() -> None:
    for name in ("test_pci_rows", "test_pci_interrupt_rows"):
        import_module(f".{name}", __package__)
    assert set(ROWS) == EXPECTED


# --- queue configuration ------------------------------------------------------------------------------------


@row("Q01", "Q02", "Q03", "Q04")
@pytest.mark.parametrize("size", [0, 3, 5, 15, 17, 24, 32, 0x8000, 0xC000, 0xFFFF])
def test_a_size_that_cannot_be_is_not_taken_over(row: str, size: int) -> None:
    world = World()
    world.negotiate()
    world.set("queue_size", 8)
    world.set("queue_size", size)
    assert world.get("queue_size") == 8
    assert world.rules() == {"BadQueueSize": 1}
    queue = world.queue(size=8)
    world.status(LIVE)
    assert world.works(queue)


@row("Q02")
def test_a_packed_queue_need_be_no_power_of_two(row: str) -> None:
    world = World()
    world.status(UP)
    world.features(world.bank.offered)
    assert world.status(READY) == READY
    world.set("queue_size", 0)
    assert world.get("queue_size") == SIZE
    queue = world.queue(size=15)
    assert world.get("queue_size") == 15
    world.status(LIVE)
    assert world.works(queue)
    assert world.rules() == {"BadQueueSize": 1}


@row("Q05", "Q11")
@pytest.mark.parametrize("name", ["queue_size", "queue_desc", "queue_driver", "queue_device"])
@pytest.mark.parametrize("status", [READY, LIVE])
def test_an_enabled_queue_is_frozen(row: str, name: str, status: int) -> None:
    world = World()
    world.negotiate()
    queue = world.queue()
    world.status(status)
    before = world.get(name)
    world.set(name, 8)
    if COMMON[name].size == 8:
        world.write(world.layout.common, COMMON[name].offset + 4, 4, 1)
    assert world.get(name) == before
    assert set(world.rules()) == {"EnabledQueueWritten"}
    world.status(LIVE)
    assert world.works(queue)


@row("Q05")
def test_a_vector_can_be_changed_of_an_enabled_queue(row: str) -> None:
    world = World()
    world.live()
    world.set("queue_msix_vector", 1)
    assert world.get("queue_msix_vector") == 1
    assert world.rules() == {}


@row("Q06")
@pytest.mark.parametrize("value", [0, 2, 3, 0xFFFF])
def test_only_1_enables_and_nothing_disables(row: str, value: int) -> None:
    world = World()
    world.negotiate()
    queue = world.queue(enable=False)
    world.set("queue_enable", value)
    assert world.get("queue_enable") == 0
    world.set("queue_enable", 1)
    world.set("queue_enable", 1)
    world.set("queue_enable", value)
    assert world.get("queue_enable") == 1
    assert world.rules() == {"BadQueueEnable": 2, "EnabledQueueWritten": 1}
    world.status(LIVE)
    assert world.works(queue)


@row("Q07", "Q08", "Q09", "Q11", "D11")
@pytest.mark.parametrize(
    ("desc", "driver", "device"),
    [
        (8, 0x1000, 0x2000),
        (0, 0x1001, 0x2000),
        (0, 0x1000, 0x2002),
        (MEMORY - 16 * SIZE + 16, 0x1000, 0x2000),
        (0, MEMORY - 4 - 2 * SIZE, MEMORY),
        (0, 0x1000, (1 << 64) - 4),
        ((1 << 64) - 16, 0x1000, 0x2000),
        (1 << 32, 1 << 32, 1 << 32),
    ],
)
@pytest.mark.parametrize("first", ["enable", "driver_ok"])
def test_rings_that_cannot_be_break_the_device(row: str, desc: int, driver: int, device: int, first: str) -> None:
    world = World()
    world.negotiate("EVENT_IDX")
    if first == "driver_ok":
        world.status(LIVE)
    for name, value in (("queue_desc", desc), ("queue_driver", driver), ("queue_device", device)):
        world.set(name, value)
    world.set("queue_enable", 1)
    world.status(LIVE)
    world.run()
    assert world.get("device_status") & S.DEVICE_NEEDS_RESET
    world.notify(0)
    world.run()
    assert world.works(world.live())


@row("Q07")
def test_rings_at_0_overlap_and_hurt_nobody(row: str) -> None:
    world = World()
    world.negotiate()
    world.set("queue_enable", 1)
    world.status(LIVE)
    world.notify(0)
    world.run()
    assert world.works(world.live())


@row("Q09")
def test_a_ring_may_end_where_memory_ends(row: str) -> None:
    world = World()
    world.negotiate()
    end = MEMORY - 16 * SIZE
    for name, value in (("queue_desc", end), ("queue_driver", 0x5000), ("queue_device", 0x6000)):
        world.set(name, value)
    world.set("queue_enable", 1)
    assert world.status(LIVE) == LIVE
    assert world.rules() == {}


@row("Q10")
def test_rings_may_overlap(row: str) -> None:
    world = World()
    world.negotiate()
    for index in range(2):
        world.set("queue_select", index)
        for name in ("queue_desc", "queue_driver", "queue_device"):
            world.set(name, 0x8000)
        world.set("queue_enable", 1)
    world.memory.write(0x8000, bytes(range(256)))
    world.status(LIVE)
    for index in range(2):
        world.notify(index)
    world.run()
    assert world.works(world.live())


@row("Q11")
def test_a_half_that_nobody_wrote_is_0(row: str) -> None:
    world = World()
    world.negotiate()
    layout = RingLayout.contiguous(SIZE, BASE)
    for name, value in (("queue_desc", layout.desc), ("queue_driver", layout.driver), ("queue_device", layout.device)):
        world.write(world.layout.common, COMMON[name].offset, 4, value)
        assert world.get(name) == value
    queue = world.queue()
    world.status(LIVE)
    assert world.works(queue)


@row("Q13", "Q15")
def test_a_reset_queue_forgets_what_is_in_flight_and_takes_other_values(row: str) -> None:
    device = upper(handlers={0: kept(lambda _: None), 1: bytes.upper})
    world = World(device)
    world.msix(1)
    world.negotiate()
    world.set("queue_msix_vector", 1)
    queue = world.queue()
    world.status(LIVE)
    world.post(queue)
    world.run()
    (chain,) = device.kept
    before = world.memory.read(0, 0x40000)
    world.set("queue_reset", 1)
    assert [world.get(name) for name in ("queue_reset", "queue_enable", "queue_size")] == [0, 0, SIZE]
    assert world.get("queue_desc") == 0
    assert world.get("queue_msix_vector") == 0xFFFF
    assert device.complete(chain, b"late") is False
    world.run()
    assert world.memory.read(0, 0x40000) == before
    world.set("queue_select", 0)
    queue = world.queue(size=4)
    assert [world.get(name) for name in ("queue_reset", "queue_enable", "queue_size")] == [0, 1, 4]
    world.post(queue)
    world.run()
    assert device.complete(device.kept[0], b"again")
    assert world.answer(queue) == b"again"
    assert (world.sink.messages, world.rules()) == ([], {})


@row("Q14")
@pytest.mark.parametrize("value", [0, 2, 0x8001, 0xFFFF])
def test_only_1_resets_a_queue(row: str, value: int) -> None:
    world = World()
    queue = world.live()
    world.set("queue_reset", value)
    assert world.rules() == {"BadQueueReset": 1}
    assert (world.get("queue_reset"), world.get("queue_enable")) == (0, 1)
    assert world.works(queue)


@row("Q14")
def test_no_queue_is_reset_without_the_feature(row: str) -> None:
    world = World()
    queue = world.live("RING_RESET")
    world.set("queue_msix_vector", 1)
    world.set("queue_reset", 1)
    assert (world.get("queue_enable"), world.get("queue_msix_vector")) == (1, 1)
    assert world.rules() == {"QueueResetNotNegotiated": 1}
    assert world.works(queue)


# --- status, features, reset --------------------------------------------------------------------------------


@row("Q16")
def test_driver_ok_without_a_queue_runs_nothing(row: str) -> None:
    world = World()
    world.negotiate()
    world.status(LIVE)
    world.notify(0)
    world.run()
    assert world.get("device_status") == LIVE
    assert world.rules() == {}
    assert world.works(world.queue())


@row("D01")
@pytest.mark.parametrize("bit", [0, 5, 24, 38, 41, 63])
def test_features_that_were_not_offered_are_refused(row: str, bit: int) -> None:
    world = World()
    world.status(UP)
    world.features(FeatureSet.from_bits(world.bank.offered.bits | 1 << bit))
    assert world.status(READY) == UP
    assert world.rules() == {"FeatureNotOffered": 1, "BadFeatures": 1}
    world.features(world.bank.offered)
    assert world.status(READY) == READY


@row("D02")
def test_features_stand_after_features_ok(row: str) -> None:
    world = World()
    accepted = world.negotiate("EVENT_IDX")
    world.set("driver_feature_select", 0)
    world.set("driver_feature", 0)
    assert world.get("driver_feature") == accepted.word(0)
    assert world.bank.accepted == accepted
    assert world.rules() == {"FeaturesAfterOk": 1}


@row("D03")
def test_a_feature_without_what_it_needs_is_refused(row: str) -> None:
    names = {"MQ": 1, "CTRL": 2}
    world = World(upper(FeatureSet("MQ", "CTRL", device=names), requires={"MQ": ("CTRL",)}))
    world.status(UP)
    world.features(world.bank.offered - FeatureSet("CTRL", device=names))
    assert world.status(READY) == UP
    world.features(world.bank.offered)
    assert world.status(READY) == READY


@row("D03")
def test_version_1_cannot_be_left_out(row: str) -> None:
    world = World()
    world.status(UP)
    world.features(FeatureSet("INDIRECT_DESC"))
    assert world.status(READY) == UP


@row("D04")
def test_driver_ok_needs_features_ok(row: str) -> None:
    world = World()
    world.status(UP)
    assert world.status(UP | S.DRIVER_OK) == UP
    world.queue()
    world.notify(0)
    world.run()
    assert world.rules()["DriverOkWithoutFeaturesOk"] == 1


@row("D05")
@pytest.mark.parametrize("status", [UP | S.DRIVER_OK, S.ACKNOWLEDGE, READY, 0x80])
def test_bits_stay_until_a_reset(row: str, status: int) -> None:
    world = World()
    queue = world.live()
    assert world.status(status) == LIVE | status
    assert world.rules()["StatusBitCleared"] == 1
    assert world.works(queue) is (status != 0x80)


@row("D06", "D07")
@pytest.mark.parametrize("bit", [S.DEVICE_NEEDS_RESET, 0x20, S.SUSPEND])
def test_bits_that_are_not_the_drivers_are_ignored(row: str, bit: int) -> None:
    world = World()
    queue = world.live()
    assert world.status(LIVE | bit) == LIVE
    assert world.works(queue)


@row("D08")
@pytest.mark.parametrize("state", ["fresh", "acknowledge", "ready", "live", "broken", "failed", "asleep"])
def test_reset_from_every_state(row: str, state: str) -> None:
    world = World()
    if state == "acknowledge":
        world.status(S.ACKNOWLEDGE)
    elif state == "ready":
        world.negotiate()
    elif state != "fresh":
        queue = world.live()
        if state == "broken":
            world.bank.broken(ValueError("on purpose"))
        elif state == "failed":
            world.status(LIVE | S.FAILED)
        elif state == "asleep":
            world.set_config(world.capability("power") + 4, 2, 3)
            world.set("device_status", 0)
            world.set_config(world.capability("power") + 4, 2, 0)
            # In D3hot nobody listened, and everything was kept.
            assert world.get("device_status") == LIVE
            assert world.works(queue)
    for _ in range(2):
        assert world.status(0) == 0
    for name in ("queue_enable", "queue_desc", "driver_feature", "queue_reset", "queue_select"):
        assert world.get(name) == 0
    assert (world.get("queue_size"), world.get("queue_msix_vector")) == (SIZE, 0xFFFF)
    assert world.read(world.layout.isr, 0, 1) == 0
    assert world.works(world.live())


@row("D09")
def test_a_reset_in_the_middle_of_a_kick(row: str) -> None:
    world = World()
    queue = world.live()
    world.post(queue)
    before = world.memory.read(0, 0x40000)
    world.status(0)
    world.run()
    assert world.memory.read(0, 0x40000) == before
    assert world.sink.levels == []


@row("D10")
def test_driver_ok_twice_is_once(row: str) -> None:
    world = World()
    queue = world.live()
    assert world.works(queue)
    assert world.status(LIVE) == LIVE
    assert world.works(queue)
    assert world.rules() == {}


@row("D12")
@pytest.mark.parametrize("msix", [False, True])
def test_no_configuration_interrupt_at_driver_ok(row: str, msix: bool) -> None:
    world = World()
    world.device.config["count"] = 1
    if msix:
        world.msix(0, 1)
    world.negotiate()
    world.device.config["count"] = 2
    world.set("config_msix_vector", 0)
    world.queue()
    world.status(LIVE)
    world.run()
    assert (world.sink.messages, world.sink.levels) == ([], [])
    assert world.read(world.layout.isr, 0, 1) == 0


@row("D13")
def test_packed_then_split(row: str) -> None:
    world = World()
    for packed in (True, False, True):
        world.status(0)
        assert world.bank.accepted == FeatureSet()
        assert all(slot == QueueSlot(slot.index, SIZE, SIZE) for slot in world.bank.slots)
        world.status(UP)
        world.features(world.bank.offered - (FeatureSet() if packed else FeatureSet("RING_PACKED")))
        assert world.status(READY) == READY
        queue = world.queue()
        world.status(LIVE)
        for _ in range(SIZE + 1):
            assert world.works(queue)


@row("D14")
@pytest.mark.parametrize("select", [2, 3, 0xFFFF_FFFF])
def test_words_that_are_not_there_change_nothing(row: str, select: int) -> None:
    world = World()
    world.status(UP)
    world.features(world.bank.offered)
    world.set("driver_feature_select", select)
    world.set("driver_feature", 0)
    assert world.status(READY) == READY


@row("D15")
@pytest.mark.parametrize("width", [2, 4])
def test_the_status_has_one_byte(row: str, width: int) -> None:
    world = World()
    queue = world.live()
    world.write(world.layout.common, COMMON["device_status"].offset, width, 0)
    assert world.get("device_status") == LIVE
    assert world.rules() == {"AccessWidth": 1}
    assert world.works(queue)


@row("D16")
@pytest.mark.parametrize("msix", [False, True])
def test_a_broken_device_says_so_once_and_comes_back(row: str, msix: bool) -> None:
    world = World()
    if msix:
        world.msix(0, 1)
    world.negotiate()
    world.set("config_msix_vector", 0)
    world.set("queue_msix_vector", 1)
    queue = world.queue()
    world.status(LIVE)
    # The index goes further than there are entries.
    world.memory.write(queue.config.driver + 2, (SIZE + 1).to_bytes(2, "little"))
    for _ in range(3):
        world.notify(0)
        world.run()
    assert world.get("device_status") == LIVE | S.DEVICE_NEEDS_RESET
    assert world.sink.vectors == ([0] if msix else [])
    assert world.sink.levels == ([] if msix else [True])
    assert world.works(world.live())


@row("D17")
def test_suspend_without_its_feature(row: str) -> None:
    world = World()
    world.status(UP)
    assert world.status(UP | S.SUSPEND) == UP
    queue = world.live()
    assert world.status(LIVE | S.SUSPEND) == LIVE
    assert world.rules() == {"SuspendNotPossible": 2}
    assert world.works(queue)
