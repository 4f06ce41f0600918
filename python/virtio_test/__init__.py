"""virtio-test: the virtio workbench for Python. Write devices, drive devices, break either side.

The names below are loaded when they are first used, so that importing the package stays cheap. A core that was
built without optimisation says so with a `DebugBuildWarning`: fit for tests, not for measuring.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Final

from ._core import __version__, build_info
from .errors import DebugBuildWarning

if TYPE_CHECKING:
    from ._core import (
        Batch,
        Chain,
        DeviceQueue,
        DriverQueue,
        GuestMemory,
        Notifier,
        Policy,
        QueueConfig,
        QueueState,
        RingLayout,
        Rule,
        Trace,
        rules,
    )
    from .carrier.loopback import Loopback
    from .clock import Clock, MonotonicClock, Timer, VirtualClock
    from .config import ConfigLayout, ConfigSpace
    from .device import RING_FEATURES, Bus, Device
    from .devices.base import BaseDevice, batched, kept
    from .devices.test import TestDevice
    from .driver.alloc import Arena
    from .driver.base import Driver
    from .driver.registers import Registers
    from .driver.request import Request
    from .driver.test import TestDriver, TestResponse
    from .errors import PeerError, UsageError, VirtioTestError
    from .features import FeatureSet
    from .loop import OwnerLoop

__all__ = [
    "RING_FEATURES",
    "Arena",
    "BaseDevice",
    "Batch",
    "Bus",
    "Chain",
    "Clock",
    "ConfigLayout",
    "ConfigSpace",
    "DebugBuildWarning",
    "Device",
    "DeviceQueue",
    "Driver",
    "DriverQueue",
    "FeatureSet",
    "GuestMemory",
    "Loopback",
    "MonotonicClock",
    "Notifier",
    "OwnerLoop",
    "PeerError",
    "Policy",
    "QueueConfig",
    "QueueState",
    "Registers",
    "Request",
    "RingLayout",
    "Rule",
    "TestDevice",
    "TestDriver",
    "TestResponse",
    "Timer",
    "Trace",
    "UsageError",
    "VirtioTestError",
    "VirtualClock",
    "__version__",
    "batched",
    "build_info",
    "kept",
    "rules",
]

_CORE: Final = "_core"
_WHERE: Final = {
    **dict.fromkeys(("Batch", "Chain", "DeviceQueue", "DriverQueue", "GuestMemory", "Notifier", "Policy"), _CORE),
    **dict.fromkeys(("QueueConfig", "QueueState", "RingLayout", "Rule", "Trace", "rules"), _CORE),
    **dict.fromkeys(("Clock", "MonotonicClock", "Timer", "VirtualClock"), "clock"),
    **dict.fromkeys(("ConfigLayout", "ConfigSpace"), "config"),
    **dict.fromkeys(("RING_FEATURES", "Bus", "Device"), "device"),
    **dict.fromkeys(("BaseDevice", "batched", "kept"), "devices.base"),
    **dict.fromkeys(("PeerError", "UsageError", "VirtioTestError"), "errors"),
    **dict.fromkeys(("TestDriver", "TestResponse"), "driver.test"),
    "Arena": "driver.alloc",
    "Driver": "driver.base",
    "FeatureSet": "features",
    "Loopback": "carrier.loopback",
    "OwnerLoop": "loop",
    "Registers": "driver.registers",
    "Request": "driver.request",
    "TestDevice": "devices.test",
}

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
