"""virtio-test: the virtio workbench for Python. Write devices, drive devices, break either side.

The names below are loaded when they are first used, so that importing the package stays cheap. A core that was
built without optimisation says so with a `DebugBuildWarning`: fit for tests, not for measuring.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Final

from ._core import __version__, build_info
from .errors import DebugBuildWarning, RuleViolation

if TYPE_CHECKING:
    from ._core import (
        Batch,
        Chain,
        DeviceQueue,
        DriverQueue,
        EntropyService,
        FileService,
        GuestMemory,
        Notifier,
        Policy,
        QueueConfig,
        QueueState,
        RingLayout,
        Rule,
        Service,
        Trace,
        Worker,
        rules,
    )
    from .carrier.loopback import Loopback
    from .carrier.mmio import MmioLoopback
    from .carrier.pci import PciLoopback
    from .carrier.qtest.machine import QtestMachine
    from .carrier.vfio_user.client import VfioUserClient
    from .checks.ring import Ring
    from .clock import Clock, MonotonicClock, Timer, VirtualClock
    from .config import ConfigLayout, ConfigSpace
    from .device import RING_FEATURES, Bus, Device
    from .devices.base import BaseDevice, batched, kept
    from .devices.blk import BlkDevice
    from .devices.console import ConsoleDevice
    from .devices.net import NetDevice
    from .devices.rng import RngDevice
    from .devices.test import TestDevice
    from .driver.alloc import Arena
    from .driver.base import Driver
    from .driver.blk import BlkDriver
    from .driver.console import ConsoleDriver
    from .driver.mmio import MmioRegisters
    from .driver.net import NetDriver
    from .driver.pci import open_pci
    from .driver.registers import Registers
    from .driver.request import Request
    from .driver.rng import RngDriver
    from .driver.test import TestDriver, TestResponse
    from .errors import PeerError, UsageError, VirtioTestError
    from .features import FeatureSet
    from .loop import OwnerLoop
    from .transport.mmio import VirtioMmio
    from .transport.pci.function import VirtioPci
    from .transport.vhost_user.registers import VhostUserRegisters

__all__ = [
    "RING_FEATURES",
    "Arena",
    "BaseDevice",
    "Batch",
    "BlkDevice",
    "BlkDriver",
    "Bus",
    "Chain",
    "Clock",
    "ConfigLayout",
    "ConfigSpace",
    "ConsoleDevice",
    "ConsoleDriver",
    "DebugBuildWarning",
    "Device",
    "DeviceQueue",
    "Driver",
    "DriverQueue",
    "EntropyService",
    "FeatureSet",
    "FileService",
    "GuestMemory",
    "Loopback",
    "MmioLoopback",
    "MmioRegisters",
    "MonotonicClock",
    "NetDevice",
    "NetDriver",
    "Notifier",
    "OwnerLoop",
    "PciLoopback",
    "PeerError",
    "Policy",
    "QtestMachine",
    "QueueConfig",
    "QueueState",
    "Registers",
    "Request",
    "Ring",
    "RingLayout",
    "RngDevice",
    "RngDriver",
    "Rule",
    "Service",
    "TestDevice",
    "TestDriver",
    "TestResponse",
    "Timer",
    "Trace",
    "UsageError",
    "VfioUserClient",
    "VhostUserRegisters",
    "VirtioMmio",
    "VirtioPci",
    "VirtioTestError",
    "VirtualClock",
    "Worker",
    "__version__",
    "batched",
    "build_info",
    "kept",
    "open_pci",
    "rules",
]

_CORE: Final = "_core"
_WHERE: Final = {
    **dict.fromkeys(("Batch", "Chain", "DeviceQueue", "DriverQueue", "GuestMemory", "Notifier", "Policy"), _CORE),
    **dict.fromkeys(("QueueConfig", "QueueState", "RingLayout", "Rule", "Trace", "rules"), _CORE),
    **dict.fromkeys(("EntropyService", "FileService", "Service", "Worker"), _CORE),
    **dict.fromkeys(("Clock", "MonotonicClock", "Timer", "VirtualClock"), "clock"),
    **dict.fromkeys(("ConfigLayout", "ConfigSpace"), "config"),
    **dict.fromkeys(("RING_FEATURES", "Bus", "Device"), "device"),
    **dict.fromkeys(("BaseDevice", "batched", "kept"), "devices.base"),
    **dict.fromkeys(("PeerError", "UsageError", "VirtioTestError"), "errors"),
    **dict.fromkeys(("TestDriver", "TestResponse"), "driver.test"),
    "Arena": "driver.alloc",
    "BlkDevice": "devices.blk",
    "BlkDriver": "driver.blk",
    "ConsoleDevice": "devices.console",
    "ConsoleDriver": "driver.console",
    "Driver": "driver.base",
    "FeatureSet": "features",
    "Loopback": "carrier.loopback",
    "MmioLoopback": "carrier.mmio",
    "MmioRegisters": "driver.mmio",
    "NetDevice": "devices.net",
    "NetDriver": "driver.net",
    "open_pci": "driver.pci",
    "OwnerLoop": "loop",
    "PciLoopback": "carrier.pci",
    "QtestMachine": "carrier.qtest.machine",
    "Registers": "driver.registers",
    "Request": "driver.request",
    "Ring": "checks.ring",
    "RngDevice": "devices.rng",
    "RngDriver": "driver.rng",
    "TestDevice": "devices.test",
    "VfioUserClient": "carrier.vfio_user.client",
    "VhostUserRegisters": "transport.vhost_user.registers",
    "VirtioMmio": "transport.mmio",
    "VirtioPci": "transport.pci.function",
}


def _explain(violation: RuleViolation) -> str:
    from .checks.explain import explain

    return explain(violation)


def _expected(violation: RuleViolation) -> str:
    from .checks.explain import expected

    return expected(violation)


# Errors stand below the catalogue that explains them, and may not know it.
RuleViolation.explainer = _explain
RuleViolation.expecter = _expected

if build_info()["profile"] == "debug":
    warnings.warn("the core of virtio_test is a debug build: slow, not for measuring", DebugBuildWarning, stacklevel=2)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'virtio_test' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE})
