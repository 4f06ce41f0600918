"""Where what the PCI bus in this process takes begins and ends: each number, and the next one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from virtio_test.carrier.pci import STORM, PciLoopback
from virtio_test.errors import InvalidArgument, StateError

from .pci_world import World


def fails(what: Callable[[], object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        what()


def bus(**options: object) -> PciLoopback:
    return PciLoopback(World(**options).function)  # type: ignore[arg-type]


@pytest.mark.parametrize(("bar", "size"), [(0, 4), (5, 4), (5, 1 << 20)])
def test_a_bar_is_placed_once(bar: int, size: int) -> None:
    made = bus()
    assert made.place_bar(bar, size, io=False) == made.place_bar(bar, size, io=False) >= 0xC000_0000


@pytest.mark.parametrize(("bar", "size"), [(-1, 16), (6, 16), (0, 2), (0, 1), (0, 0), (0, 6), (0, 24)])
def test_a_bar_that_cannot_be(bar: int, size: int) -> None:
    fails(lambda: bus().place_bar(bar, size, io=False), InvalidArgument, f"BAR {bar} of {size} bytes")


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_accesses_of_a_bar_to_its_end(size: int) -> None:
    made = bus()
    fails(lambda: made.read_bar(0, 0, size), StateError, "BAR 0 was not placed")
    fails(lambda: made.write_bar(0, 0, size, 0), StateError, "BAR 0 was not placed")
    made.place_bar(0, 64, io=False)
    for offset in (0, 64 - size):
        assert made.read_bar(0, offset, size) == (1 << 8 * size) - 1
        for value in (0, (1 << 8 * size) - 1):
            made.write_bar(0, offset, size, value)
    for offset in (-size, -1, 65 - size, 64):
        fails(lambda at=offset: made.read_bar(0, at, size), InvalidArgument, f"an access of {size} bytes")
    for value in (-1, 1 << 8 * size):
        fails(lambda value=value: made.write_bar(0, 0, size, value), InvalidArgument, "does not fit")


@pytest.mark.parametrize("size", [-1, 0, 3, 5, 16])
def test_accesses_that_no_bus_has(size: int) -> None:
    made = bus()
    made.place_bar(0, 64, io=False)
    fails(lambda: made.read_bar(0, 0, size), InvalidArgument, f"an access of {size} bytes")
    fails(lambda: made.write_bar(0, 0, size, 0), InvalidArgument, f"an access of {size} bytes")
    fails(lambda: made.read_config(0, size), InvalidArgument, f"access of {size} bytes")


@pytest.mark.parametrize("size", [1, 2, 4])
def test_configuration_space_from_one_end_to_the_other(size: int) -> None:
    made = bus(behind_express_port=True)
    for offset in (0, 4096 - size):
        made.read_config(offset, size)
        for value in (0, (1 << 8 * size) - 1):
            made.write_config(offset, size, value)
    assert made.read_config(0, size) == 0x106D_1AF4 & (1 << 8 * size) - 1
    for offset in {-size, -4, 4096, size // 2} - {0}:
        fails(lambda at=offset: made.read_config(at, size), InvalidArgument, f"access of {size} bytes")


def test_a_message_for_each_vector_of_the_largest_table() -> None:
    made = bus()
    assert [made.message(vector)[1] for vector in (0, 1, 2047)] == [0, 1, 2047]
    for vector in (-1, 2048):
        fails(lambda vector=vector: made.message(vector), StateError, "there are 2048")


def test_a_line_that_was_released_before_its_turn_is_none() -> None:
    world = World()
    made = PciLoopback(world.function)
    heard: list[int] = []
    made.listen(message=heard.append, line=lambda: heard.append(1))
    world.function.interrupts.call(0)
    world.function.interrupts.read_isr()
    world.run()
    assert heard == []


def test_a_line_is_called_as_often_as_a_storm_has_turns() -> None:
    world = World()
    made = PciLoopback(world.function)
    heard: list[int] = []

    def line() -> None:
        heard.append(1)
        assert len(heard) <= STORM

    made.listen(message=heard.append, line=line)
    world.function.interrupts.call(0)
    world.run()
    assert (len(heard), made.storms) == (STORM, 1)
