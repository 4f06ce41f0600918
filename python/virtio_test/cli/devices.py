"""The devices that can be served by name, and the options that each of them takes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

from virtio_test.devices.base import BaseDevice
from virtio_test.errors import InvalidArgument

from .params import DEVICES

__all__ = ["Choice", "DeviceName", "make"]

DeviceName: TypeAlias = Literal["test", "blk", "rng", "console", "net"]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A device and its options; None where the command line said nothing.

    Attributes:
        device: which.
        timer: the timer variant of the test device.
        first_after: seconds from now to its first tick.
        every: seconds between ticks.
        image: the file behind a block device.
        read_only: whether its driver may only read.
        queues: its request queues, or pairs of queues of a network device.
        serial: its identification.
        backend: what a network device does with frames.
        frame_size: bytes of each frame that it generates.
        mac: its address, as text.
        mtu: its largest payload.
        native: served without Python: in the owner loop, or in threads that wait in that way.
    """

    device: DeviceName = "test"
    timer: bool = False
    first_after: float | None = None
    every: float | None = None
    image: Path | None = None
    read_only: bool = False
    queues: int | None = None
    serial: str | None = None
    backend: Literal["loopback", "drop", "generate"] | None = None
    frame_size: int | None = None
    mac: str | None = None
    mtu: int | None = None
    native: Literal["loop", "blocking", "adaptive", "busy"] | None = None

    @property
    def wait(self) -> Literal["blocking", "adaptive", "busy"] | None:
        """How the threads of a native device wait."""
        return None if self.native == "loop" else self.native


_OWN: Final[dict[DeviceName, frozenset[str]]] = {
    "test": frozenset({"timer", "first_after", "every"}),
    "blk": frozenset({"image", "read_only", "queues", "serial", "native"}),
    "rng": frozenset({"native"}),
    "console": frozenset(),
    "net": frozenset({"queues", "backend", "frame_size", "mac", "mtu", "native"}),
}


def make(choice: Choice, *, console: Callable[[str], object]) -> BaseDevice:
    """The device of `choice`; `console` takes the lines that it prints.

    Raises:
        InvalidArgument: an option that the device does not have or cannot take, or a missing one.
        OSError: the image cannot be opened.
    """
    if choice.device not in DEVICES:
        raise InvalidArgument(f"unknown device {choice.device!r}; there are: {', '.join(DEVICES)}")
    for owner, names in _OWN.items():
        for name in sorted(names - _OWN[choice.device]):
            if getattr(choice, name) not in (None, False):
                option = name.replace("_", "-")
                raise InvalidArgument(f"--{option} is an option of the device {owner}, not of {choice.device}")
    if choice.device == "blk":
        return _blk(choice)
    if choice.device == "net":
        return _net(choice)
    if choice.device == "rng":
        from virtio_test.devices.rng import RngDevice

        return RngDevice(native=choice.native is not None, wait=choice.wait)
    if choice.device == "console":
        from virtio_test.devices.console import ConsoleDevice

        return ConsoleDevice(output=_Lines(console))
    from virtio_test.devices.test import TestDevice

    return TestDevice(
        timer=choice.timer,
        first_after=30.0 if choice.first_after is None else choice.first_after,
        every=1.0 if choice.every is None else choice.every,
        console=console,
    )


def _blk(choice: Choice) -> BaseDevice:
    from virtio_test.devices.blk import BlkDevice

    if choice.image is None:
        raise InvalidArgument("the device blk needs an image: give --image FILE, whose size is a multiple of 512")
    return BlkDevice(
        choice.image,
        read_only=choice.read_only,
        num_queues=choice.queues or 1,
        serial="virtio-test" if choice.serial is None else choice.serial,
        native=choice.native is not None,
        wait=choice.wait,
    )


def _net(choice: Choice) -> BaseDevice:
    from virtio_test.devices.net import MAC, Generate, NetDevice

    if choice.frame_size is not None and choice.backend != "generate":
        raise InvalidArgument("--frame-size is of frames that are generated: give --backend generate")
    backend = choice.backend or "loopback"
    return NetDevice(
        Generate(60 if choice.frame_size is None else choice.frame_size) if backend == "generate" else backend,
        mac=MAC if choice.mac is None else _address(choice.mac),
        mtu=choice.mtu,
        pairs=choice.queues or 1,
        native=choice.native is not None,
        wait=choice.wait,
    )


def _address(text: str) -> bytes:
    if not re.fullmatch(r"[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}", text):
        raise InvalidArgument(f"{text!r} is no MAC address: give one such as 52:54:00:12:34:56")
    return bytes.fromhex(text.replace(":", ""))


class _Lines:
    """What a guest writes to its console, in lines; one that is too long is cut."""

    _LONGEST: Final = 4096

    def __init__(self, show: Callable[[str], object]) -> None:
        self._show = show
        self._rest = b""

    def __call__(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > self._LONGEST:
            lines.append(self._rest)
            self._rest = b""
        for line in lines:
            self._show(line.rstrip(b"\r").decode("utf-8", "backslashreplace"))
