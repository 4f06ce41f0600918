"""The PCI bus in process: addresses that decide, messages and a line that come as turns of the loop."""

from __future__ import annotations

import pytest
from virtio_test.carrier.pci import STORM, PciLoopback
from virtio_test.driver.access import PciAccess
from virtio_test.errors import InvalidArgument, StateError
from virtio_test.spec.pci import COMMON

from .pci_world import COMMAND, LIVE, World

STATUS = COMMON["device_status"].offset


class Bus:
    """A function on a bus, with its BARs placed and nobody listening yet."""

    def __init__(self, *, place: bool = True) -> None:
        self.world = World()
        self.bus = PciLoopback(self.world.function)
        self.heard: list[object] = []
        if place:
            for bar in self.world.function.bars:
                self.program(bar.index, self.bus.place_bar(bar.index, bar.size, io=bar.kind == "io"))

    def program(self, bar: int, address: int) -> None:
        self.bus.write_config(0x10 + 4 * bar, 4, address & 0xFFFF_FFFF)
        if bar == 4:
            self.bus.write_config(0x14 + 4 * bar, 4, address >> 32)

    def listen(self) -> None:
        self.bus.listen(message=self.heard.append, line=lambda: self.heard.append("line"))


def test_it_is_a_bus() -> None:
    made = Bus()
    assert isinstance(made.bus, PciAccess)
    assert made.bus.loop is made.world.function.loop
    assert made.bus.memory is made.world.memory


def test_a_bar_answers_where_it_is_programmed() -> None:
    made = Bus()
    assert made.bus.read_bar(4, STATUS, 1) == 0
    first = made.world.function.bar_base(4)
    made.program(4, first + 0x10_0000)
    assert made.bus.read_bar(4, STATUS, 1) == 0xFF
    made.bus.write_bar(4, STATUS, 1, 1)
    made.program(4, first)
    assert made.bus.read_bar(4, STATUS, 1) == 0


def test_what_another_bar_claims_is_that_ones() -> None:
    made = Bus()
    low = made.world.function.bar_base(1)
    made.program(1, 0xD000_0000)
    assert made.bus.read_bar(1, STATUS, 1) == 0xFF
    made.program(4, low)
    made.world.status(1)
    assert made.bus.read_bar(1, STATUS, 1) == 1


def test_no_decoding_no_answer() -> None:
    made = Bus()
    made.bus.write_config(COMMAND, 2, 0)
    assert made.bus.read_bar(4, STATUS, 1) == 0xFF


def test_bars_get_room_of_their_own() -> None:
    made = Bus(place=False)
    first = made.bus.place_bar(0, 0x1000, io=False)
    second = made.bus.place_bar(2, 0x10_0000, io=False)
    assert first + 0x1000 <= second
    assert not second & 0xF_FFFF
    assert made.bus.place_bar(0, 0x1000, io=False) == first
    assert made.bus.place_bar(4, 1 << 40, io=False) == 1 << 40
    assert made.bus.place_bar(5, 32, io=True) < 0x1_0000
    for size, io in ((1 << 63, False), (0x1_0000, True)):
        with pytest.raises(StateError, match="no room for BAR 3"):
            made.bus.place_bar(3, size, io=io)


def test_misuse() -> None:
    made = Bus()
    bus = made.bus
    for wrong in (
        lambda: bus.read_config(1, 2),
        lambda: bus.read_config(0, 3),
        lambda: bus.write_config(4096, 4, 0),
        lambda: bus.write_config(0, 1, 256),
        lambda: bus.place_bar(6, 16, io=False),
        lambda: bus.place_bar(0, 3, io=False),
        lambda: bus.read_bar(4, 0x4000, 1),
        lambda: bus.read_bar(4, 0, 3),
        lambda: bus.write_bar(4, 0, 2, -1),
    ):
        with pytest.raises(InvalidArgument):
            wrong()
    with pytest.raises(StateError, match="BAR 0 was not placed"):
        bus.read_bar(0, 0, 4)
    for vector in (-1, 2048):
        with pytest.raises(StateError, match="no message"):
            bus.message(vector)


def test_configuration_space_ends() -> None:
    made = Bus()
    assert made.bus.read_config(256, 4) == 0xFFFF_FFFF
    made.bus.write_config(256, 4, 0)


def test_messages_are_turns() -> None:
    made = Bus()
    world = made.world
    for vector in range(2):
        address, data = made.bus.message(vector)
        made.bus.write_bar(1, 16 * vector, 8, address)
        made.bus.write_bar(1, 16 * vector + 8, 4, data)
        made.bus.write_bar(1, 16 * vector + 12, 4, 0)
    world.control(enabled=True)
    world.function.interrupts.config_vector = 1
    made.listen()
    world.function.interrupts.config_changed()
    assert made.heard == []
    world.run()
    assert made.heard == [1]
    made.bus.write_bar(1, 16, 8, 0x1234_0000)
    world.function.interrupts.config_changed()
    world.run()
    assert (made.heard, made.bus.strays) == ([1], 1)


def test_the_line_is_a_level() -> None:
    made = Bus()
    world = made.world
    made.bus.loop.run_pending()
    queue = world.live()

    def handler() -> None:
        made.heard.append("line")
        if len(made.heard) == 3:
            world.read(world.layout.isr, 0, 1)

    world.post(queue)
    world.run()
    made.bus.listen(message=made.heard.append, line=handler)
    world.run()
    assert made.heard == ["line"] * 3


def test_a_line_that_nobody_serves_is_switched_off() -> None:
    made = Bus()
    world = made.world
    queue = world.live()
    made.listen()
    world.post(queue)
    world.run()
    assert len(made.heard) == STORM
    assert made.bus.storms == 1
    world.status(0)
    queue = world.live()
    assert world.get("device_status") == LIVE
    made.heard.clear()
    world.post(queue)
    world.run()
    assert len(made.heard) == STORM
