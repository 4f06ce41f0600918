"""The PCI rows of the robustness catalogue, X01 to X08, at the registers and in the window."""

from __future__ import annotations

from itertools import product

import pytest
from virtio_test.features import FeatureSet
from virtio_test.spec.pci import CAP, COMMON, COMMON_SIZE, NO_VECTOR

from .pci_world import LIVE, S, World, row

WIDTHS = (1, 2, 3, 4, 8)


def defined(offset: int, size: int) -> bool:
    """Whether an access is one register, or a half of one with 64 bits."""
    return any(
        (offset, size) == (each.offset, each.size)
        or (each.size == 8 and size == 4 and offset in (each.offset, each.offset + 4))
        for each in COMMON.values()
    )


@row("X01")
@pytest.mark.parametrize("width", WIDTHS)
def test_registers_are_read_with_their_width(row: str, width: int) -> None:
    world = World()
    for offset in range(COMMON_SIZE + 8):
        read = world.read(world.layout.common, offset, width)
        broken = world.rules().get("AccessWidth", 0)
        world.bank.ignored.clear()
        assert (broken == 0) == defined(offset, width), (offset, width)
        if broken:
            assert read == (1 << 8 * width) - 1


@row("X01")
@pytest.mark.parametrize("width", WIDTHS)
def test_a_write_of_another_width_changes_nothing(row: str, width: int) -> None:
    world = World()
    world.negotiate()
    world.queue(enable=False)
    before = {name: world.get(name) for name in COMMON}
    for offset, value in product(range(COMMON_SIZE + 8), (0, 1, (1 << 8 * width) - 1)):
        if not defined(offset, width):
            world.write(world.layout.common, offset, width, value)
            assert {name: world.get(name) for name in COMMON} == before, (offset, value)
    assert world.rules()["AccessWidth"] > 0


@row("X01")
def test_halves_in_any_order_and_whole(row: str) -> None:
    world = World()
    world.negotiate()
    for name in ("queue_desc", "queue_driver", "queue_device"):
        at = COMMON[name].offset
        for half in (4, 0):
            world.write(world.layout.common, at + half, 4, 0x1111_0000 + half)
        assert world.get(name) == 0x1111_0004_1111_0000
        world.write(world.layout.common, at, 8, 0x1234_5678_9ABC_DEF0)
        assert world.read(world.layout.common, at, 8) == world.get(name) == 0x1234_5678_9ABC_DEF0
    assert world.rules() == {}


@row("X02")
@pytest.mark.parametrize("vector", [3, 4, 0x7FF, 0x800, 0xFFFE, 0xFFFF])
def test_a_vector_that_is_not_there_is_none(row: str, vector: int) -> None:
    world = World(vectors=3)
    for name in ("config_msix_vector", "queue_msix_vector"):
        world.set(name, 2)
        assert world.get(name) == 2
        world.set(name, vector)
        assert world.get(name) == NO_VECTOR
    assert world.rules() == ({} if vector == NO_VECTOR else {"BadVector": 2})


@row("X02")
@pytest.mark.parametrize("vectors", [1, 2, 3, 65, 0x800])
def test_every_event_can_have_every_vector(row: str, vectors: int) -> None:
    world = World(vectors=vectors)
    assert (world.config(world.capability("msix") + 2, 2) & 0x7FF) + 1 == vectors
    for vector in {0, 1, vectors // 2, vectors - 1} & set(range(vectors)):
        world.set("config_msix_vector", vector)
        assert world.get("config_msix_vector") == vector
        for queue in range(2):
            world.set("queue_select", queue)
            world.set("queue_msix_vector", vector)
            assert world.get("queue_msix_vector") == vector


@row("X02")
def test_without_msix_there_is_no_vector(row: str) -> None:
    world = World(vectors=0)
    world.set("config_msix_vector", 0)
    assert world.get("config_msix_vector") == NO_VECTOR
    assert "msix" not in world.plan.capabilities


@row("X03")
@pytest.mark.parametrize(("offset", "size"), [(0, 1), (0, 3), (0, 4), (0, 8), (1, 2), (2, 2), (8, 2), (0x1000, 2)])
def test_an_odd_notification_kicks_nobody(monkeypatch: pytest.MonkeyPatch, row: str, offset: int, size: int) -> None:
    world = World()
    queue = world.live()
    world.post(queue, kick=False)
    world.run()
    world.bank.ignored.clear()
    kicked: list[int] = []
    monkeypatch.setattr(world.bank, "kick", kicked.append)
    world.write(world.layout.notify, offset, size, 0)
    inside = offset + size <= world.layout.notify.length
    assert (kicked, world.rules()) == ([], {"BadNotification" if inside else "AccessWidth": 1})


@row("X03", "A17")
@pytest.mark.parametrize("value", [0, 1, 2, 0xFFFF])
def test_a_place_behind_the_last_queue_kicks_nobody(monkeypatch: pytest.MonkeyPatch, row: str, value: int) -> None:
    """Two bytes for each of two queues, in a structure that has six."""
    world = World(multiplier=2)
    world.live()
    kicked: list[int] = []
    monkeypatch.setattr(world.bank, "kick", kicked.append)
    world.write(world.layout.notify, 4, 2, value)
    assert (kicked, world.rules()) == ([], {"BadNotification": 1})


@row("X03", "A17")
@pytest.mark.parametrize(("place", "value"), [(0, 0xFFFF), (0, 1), (1, 0)])
def test_the_place_says_which_queue(monkeypatch: pytest.MonkeyPatch, row: str, place: int, value: int) -> None:
    world = World()
    world.live()
    kicked: list[int] = []
    monkeypatch.setattr(world.bank, "kick", kicked.append)
    world.notify(place, value)
    assert (kicked, world.rules()) == ([place], {"NotificationValue": 1})


@row("A17")
@pytest.mark.parametrize("value", [2, 3, 0x7FFF, 0x8000, 0xFFFF])
def test_a_queue_that_is_not_there_is_not_kicked(monkeypatch: pytest.MonkeyPatch, row: str, value: int) -> None:
    world = World(multiplier=0)
    queue = world.live()
    kicked: list[int] = []
    monkeypatch.setattr(world.bank, "kick", kicked.append)
    world.notify(0, value)
    assert (kicked, world.rules()) == ([], {"BadNotification": 1})
    monkeypatch.undo()
    assert world.works(queue)


@row("A18")
def test_a_doorbell_before_driver_ok_is_not_lost(row: str) -> None:
    world = World()
    world.negotiate()
    queue = world.queue()
    world.post(queue)
    assert world.answer(queue) is None
    assert set(world.rules()) == {"NotifiedEarly"}
    world.status(LIVE)
    assert world.answer(queue) == b"HELLO"


@row("X04")
@pytest.mark.parametrize("width", WIDTHS)
def test_reading_the_isr_clears_it(row: str, width: int) -> None:
    world = World()
    queue = world.live()
    world.works(queue)
    world.device.config["count"] = 7
    world.run()
    for offset in range(1, 4):
        assert world.read(world.layout.isr, offset, 1) == 0
    if width <= 4:
        assert world.read(world.layout.isr, 0, width) == 3
    else:
        assert world.read(world.layout.isr, 0, width) == (1 << 64) - 1
        assert world.read(world.layout.isr, 0, 1) == 3
    assert world.read(world.layout.isr, 0, 1) == 0


@row("X04")
@pytest.mark.parametrize("width", [1, 2, 4])
def test_writing_the_isr_does_nothing(row: str, width: int) -> None:
    world = World()
    queue = world.live()
    world.works(queue)
    world.write(world.layout.isr, 0, width, 0)
    world.write(world.layout.isr, 0, width, (1 << 8 * width) - 1)
    assert world.rules() == {"ReadOnlyRegister": 2}
    assert world.read(world.layout.isr, 0, 1) == 1


class Window:
    """The PCI configuration access capability, as its driver uses it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.at = world.capability("pci_cfg")
        self.data = self.at + 16

    def aim(self, bar: int, offset: int, length: int) -> None:
        self.world.set_config(self.at + CAP["bar"].offset, 1, bar)
        self.world.set_config(self.at + CAP["offset"].offset, 4, offset)
        self.world.set_config(self.at + CAP["length"].offset, 4, length)

    def read(self, size: int = 4) -> int:
        return self.world.config(self.data, size)

    def write(self, value: int, size: int = 4) -> None:
        self.world.set_config(self.data, size, value)


@row("X05")
@pytest.mark.parametrize("decode", [False, True])
def test_the_window_reaches_every_structure(row: str, decode: bool) -> None:
    world = World(on=decode)
    window = Window(world)
    common = world.layout.common
    window.aim(common.bar, common.offset + COMMON["queue_size"].offset, 2)
    assert window.read(2) == window.read() & 0xFFFF == 16
    window.aim(common.bar, common.offset + COMMON["device_status"].offset, 1)
    # The length of the window counts, not the width of the access to it.
    window.write(0xFFFF_FF00 | S.ACKNOWLEDGE)
    assert window.read(1) == S.ACKNOWLEDGE
    place = world.layout.config
    assert place is not None
    window.aim(place.bar, place.offset + 4, 4)
    window.write(0x1234_5678)
    assert world.device.config["word"] == 0x1234_5678
    assert window.read() == 0x1234_5678
    assert world.rules() == {}


@row("X05")
def test_the_window_kicks_and_reads_the_isr(row: str) -> None:
    world = World()
    queue = world.live()
    window = Window(world)
    world.post(queue, kick=False)
    place = world.layout.notify
    window.aim(place.bar, place.offset, 2)
    window.write(0, 2)
    assert world.answer(queue) == b"HELLO"
    window.aim(world.layout.isr.bar, world.layout.isr.offset, 1)
    assert [window.read(1), window.read(1)] == [1, 0]
    assert world.sink.levels == [True, False]


@row("X05")
@pytest.mark.parametrize(
    ("bar", "offset", "length"),
    [
        *((bar, 0, 4) for bar in (0, 1, 2, 3, 5, 6, 7, 255)),
        *((4, 0, length) for length in (3, 5, 8, 0xFFFF_FFFF)),
        *((4, offset, 4) for offset in (1, 2, 3, 0x40, 0x800, 0x4000, 0xFFFF_FFFC, 0x8000_0000)),
        (4, 0x2008, 4),
        (4, 0x2001, 2),
        (4, 0x2002, 4),
        (4, 0x1, 2),
        (4, 0x15, 2),
        # Within the device's configuration space, whose bytes can be accessed in any width but through the window.
        (4, 0x2001, 3),
        (4, 0x2000, 8),
    ],
)
def test_the_window_reaches_nothing_else(row: str, bar: int, offset: int, length: int) -> None:
    world = World()
    world.live()
    window = Window(world)
    before = {name: world.get(name) for name in COMMON}
    table = world.read(world.layout.table, 12, 4)
    assert world.layout.config == (4, 0x2000, 10)
    config = world.device.config.read(0, 10)
    window.aim(bar, offset, length)
    assert window.read() == 0xFFFF_FFFF
    window.write(0)
    window.write(0xFFFF_FFFF)
    assert {name: world.get(name) for name in COMMON} == before
    assert world.read(world.layout.table, 12, 4) == table
    assert world.device.config.read(0, 10) == config
    assert world.rules() == {"BadWindow": 3}


@row("X05")
def test_a_window_that_nobody_set_up_is_plain_bytes(row: str) -> None:
    world = World()
    window = Window(world)
    window.write(0x55AA)
    assert window.read() == 0x55AA
    world.function.read_config(0, 256)
    assert world.rules() == {}


@row("X05")
def test_a_copy_of_configuration_space_reads_no_window(row: str) -> None:
    world = World()
    queue = world.live()
    world.works(queue)
    window = Window(world)
    window.aim(world.layout.isr.bar, world.layout.isr.offset, 1)
    world.function.read_config(0, 256)
    assert window.read(1) == 1


@row("X06")
@pytest.mark.parametrize("select", [2, 3, 4, 31, 0x8000_0000, 0xFFFF_FFFF])
def test_there_are_no_features_beyond_the_second_word(row: str, select: int) -> None:
    world = World()
    for name in ("device_feature", "driver_feature"):
        world.set(f"{name}_select", select)
        assert world.get(f"{name}_select") == select
        assert world.get(name) == 0
    world.set("driver_feature", 0xFFFF_FFFF)
    assert world.bank.accepted == FeatureSet() or select in (2, 3)
    world.set("device_feature_select", 1)
    assert world.get("device_feature") == world.bank.offered.word(1)


@row("X07")
@pytest.mark.parametrize("name", [name for name, each in COMMON.items() if not each.driver_writable])
@pytest.mark.parametrize("value", [0, 1, 0xFF])
def test_read_only_registers_stay(row: str, name: str, value: int) -> None:
    world = World()
    before = world.get(name)
    world.set(name, value)
    assert world.get(name) == before
    assert world.rules() == {"ReadOnlyRegister": 1}


@row("X07")
def test_capabilities_stay(row: str) -> None:
    world = World()
    before = world.function.read_config(0, 256)
    writable = {world.capability("pci_cfg") + at for at in (4, *range(8, 20))}
    writable |= {world.capability("msix") + 3, world.capability("power") + 4}
    for at in range(0x40, 0x100):
        if at not in writable and at != world.capability("reset") + 4:
            world.set_config(at, 1, before[at] ^ 0xFF)
    assert world.function.read_config(0, 256) == before


@row("X08")
def test_the_generation_moves_with_every_change_that_was_seen(row: str) -> None:
    world = World()
    world.live()
    seen = set[int]()
    for value in range(300):
        before = world.get("config_generation")
        assert world.read(world.layout.config, 0, 4) == value
        assert world.get("config_generation") == before
        world.device.config["count"] = value + 1
        assert world.get("config_generation") != before
        seen.add(before)
    assert seen == set(range(256))


@row("X08")
def test_256_unseen_changes_are_not_mistaken_for_none(row: str) -> None:
    world = World()
    before = world.get("config_generation")
    world.read(world.layout.config, 0, 4)
    for value in range(1, 257):
        world.device.config["count"] = value
    assert world.get("config_generation") != before
