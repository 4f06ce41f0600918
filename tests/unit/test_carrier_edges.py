"""Where what the loopbacks without a PCI bus take begins and ends: each number, and the next one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from virtio_test._core import QueueConfig, RingLayout
from virtio_test.carrier.loopback import Loopback
from virtio_test.carrier.mmio import MmioLoopback
from virtio_test.errors import InvalidArgument, NoFeature, StateError
from virtio_test.features import FeatureSet
from virtio_test.transport.mmio import VirtioMmio

from .pci_world import LIVE, READY, SIZE, UP, upper

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
