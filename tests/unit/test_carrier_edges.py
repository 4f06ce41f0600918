"""Where what the buses in this process take begins and ends: each number, and the next one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from virtio_test._core import QueueConfig, RingLayout
from virtio_test.carrier.loopback import Loopback
from virtio_test.carrier.mmio import MmioLoopback
from virtio_test.carrier.pci import STORM, PciLoopback
from virtio_test.errors import InvalidArgument, NoFeature, StateError
from virtio_test.features import FeatureSet
from virtio_test.transport.mmio import VirtioMmio

from .pci_world import LIVE, READY, SIZE, UP, World, upper

RESETTABLE = FeatureSet("RING_RESET")


def fails(what: Callable[[], object], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        what()


# --- no bus at all --------------------------------------------------------------------------------------------


def agreed(*more: FeatureSet) -> Loopback:
    """A device of two queues up to FEATURES_OK."""
    side = Loopback(upper(), offered=upper().features | RESETTABLE)
    for status in (1, int(UP)):
        side.write_status(status)
    side.write_driver_features((FeatureSet("VERSION_1").bits) | sum(each.bits for each in more))
    return side


def ring(index: int, size: int = SIZE) -> QueueConfig:
    return QueueConfig.from_layout(RingLayout.contiguous(size, 0x10000 * (index + 1)), index=index)


def test_queues_that_can_be_enabled() -> None:
    side = agreed()
    fails(lambda: side.enable_queue(ring(0)), StateError, "after FEATURES_OK")
    side.write_status(int(READY))
    fails(lambda: side.enable_queue(ring(2)), InvalidArgument, "queue 2 with 16 entries")
    fails(lambda: side.enable_queue(ring(0, 2 * SIZE)), InvalidArgument, "queue 0 with 32 entries")
    side.enable_queue(ring(0, SIZE))
    side.enable_queue(ring(1, SIZE // 2))
    fails(lambda: side.enable_queue(ring(0)), StateError, "is enabled already")
    assert [each.enabled for each in side.bank.slots] == [True, True]


def test_queues_that_can_be_reset() -> None:
    side = agreed(RESETTABLE)
    side.write_status(int(READY))
    side.enable_queue(ring(0))
    side.write_status(int(LIVE))
    for index in (1, 2):
        fails(lambda index=index: side.reset_queue(index), InvalidArgument, f"queue {index} is not enabled")
    side.reset_queue(0)
    assert not side.bank.slots[0].enabled
    without = agreed()
    without.write_status(int(READY))
    without.enable_queue(ring(0))
    fails(lambda: without.reset_queue(0), NoFeature, "RING_RESET was not negotiated")
    assert without.bank.slots[0].enabled


# --- the page -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_values_that_fit_into_an_access_of_the_page(size: int) -> None:
    bus = MmioLoopback(VirtioMmio(upper()))
    largest = (1 << 8 * size) - 1
    for value in (0, largest):
        bus.write(0x104, size, value)
        assert bus.read(0x104, size) == (0 if size == 8 else value)  # no field has 8 bytes
    for value in (-1, largest + 1):
        fails(lambda value=value: bus.write(0x104, size, value), InvalidArgument, f"does not fit {size} bytes")


@pytest.mark.parametrize("size", [0, 3, 5, 16])
def test_accesses_that_a_page_does_not_have(size: int) -> None:
    bus = MmioLoopback(VirtioMmio(upper()))
    fails(lambda: bus.read(0x100, size), InvalidArgument, "1, 2, 4 or 8 bytes")
    fails(lambda: bus.write(0x100, size, 0), InvalidArgument, "1, 2, 4 or 8 bytes")


def test_a_page_s_interrupt_that_was_taken_back_is_none() -> None:
    bus = MmioLoopback(VirtioMmio(upper()))
    heard: list[int] = []
    bus.listen(line=lambda: heard.append(bus.read(0x60, 4)))
    interrupt = bus.mmio.interrupt
    assert interrupt is not None
    interrupt(True)  # noqa: FBT003 - a level
    bus.loop.run_pending()
    assert heard == []


# --- the PCI bus ----------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("size", [0, 3, 5, 16])
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
