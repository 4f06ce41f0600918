"""The ways in which a driver reaches a device of ours in this process: rings, indirect tables, interfaces."""

from __future__ import annotations

from typing import Final

import pytest
from virtio_test._core import GuestMemory
from virtio_test.carrier.loopback import Loopback
from virtio_test.carrier.mmio import MmioLoopback
from virtio_test.device import RING_FEATURES
from virtio_test.devices.base import BaseDevice
from virtio_test.driver.mmio import MmioRegisters
from virtio_test.features import FeatureSet
from virtio_test.transport.mmio import VirtioMmio

_SPLIT = RING_FEATURES - FeatureSet("RING_PACKED")

RINGS: Final = {
    "split": _SPLIT,
    "split, in order of nothing": _SPLIT - FeatureSet("IN_ORDER", "EVENT_IDX"),
    "packed": RING_FEATURES,
    "split, indirect": _SPLIT,
    "packed, indirect": RING_FEATURES,
    "legacy": RING_FEATURES,
}
WAYS: Final = pytest.mark.parametrize("way", list(RINGS))


def indirect(way: str) -> bool:
    return way.endswith("indirect")


def reach(device: BaseDevice, way: str = "split", *, memory: GuestMemory | None = None) -> Loopback | MmioRegisters:
    """The registers of `device`: the loopback's, or those of a legacy virtio-mmio."""
    if way == "legacy":
        return MmioRegisters(MmioLoopback(VirtioMmio(device, version=1, memory=memory)))
    return Loopback(device, memory=memory)


def errors(registers: Loopback | MmioRegisters) -> list[Exception]:
    """What the device's side has found wrong."""
    if isinstance(registers, Loopback):
        return registers.errors
    assert isinstance(registers.access, MmioLoopback)
    return registers.access.mmio.errors
