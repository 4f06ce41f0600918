"""``virtio-test request`` and ``virtio-test timer``: device and driver in this process, with both consoles."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from virtio_test.clock import MonotonicClock, VirtualClock
from virtio_test.console import print_line
from virtio_test.device import RING_FEATURES
from virtio_test.devices.test import TestDevice
from virtio_test.driver.test import TestDriver, TestResponse
from virtio_test.errors import DeviceNeedsReset, InvalidArgument
from virtio_test.features import FeatureSet
from virtio_test.loop import OwnerLoop

from .machine import Flavour, Interface, Transport, connect

__all__ = ["Way", "request", "timer"]


@dataclass(frozen=True, kw_only=True)
class Way:
    """How requests get from the driver to the device.

    Attributes:
        transport: whose registers stand between them.
        flavour: of a PCI function.
        interface: the one that the driver uses.
        intx: interrupts by the line instead of by messages (PCI).
        ring: format of the virtqueue.
        indirect: put every chain into an indirect table.
    """

    transport: Transport = "none"
    flavour: Flavour | None = None
    interface: Interface = "auto"
    intx: bool = False
    ring: Literal["split", "packed"] = "split"
    indirect: bool = False


class _Session:
    """One device, one driver and one console for both."""

    def __init__(
        self,
        device: TestDevice,
        way: Way,
        *,
        loop: OwnerLoop,
        show: Callable[[str], object] | None,
    ) -> None:
        self.lines: list[str] = []
        self.failed: OSError | None = None
        self._show = show
        device.console = self._line
        self.loop = loop
        wanted = RING_FEATURES if way.ring == "packed" else RING_FEATURES - FeatureSet("RING_PACKED")
        registers = connect(
            device,
            loop=loop,
            transport=way.transport,
            flavour=way.flavour,
            interface=way.interface,
            intx=way.intx,
        )
        if registers.legacy and way.ring == "packed":
            raise InvalidArgument("the legacy interface has no packed ring: say --ring split, or --interface modern")
        self.driver = TestDriver(
            registers, timer=device.timer, wanted=wanted, indirect=way.indirect, console=self._line
        )
        self.way = way
        self.driver.initialize()

    def _line(self, line: str) -> None:
        self.lines.append(line)
        if self._show is None or self.failed is not None:
            return
        try:
            self._show(line)
        except OSError as error:
            # Nobody reads our output any more. That is no fault of the device, whose handler this line comes from.
            self.failed = error

    def check(self) -> None:
        """Raise what went wrong with the output, outside of device and driver."""
        if self.failed is not None:
            raise self.failed

    def facts(self) -> dict[str, object]:
        return {
            "transport": self.way.transport,
            "interface": "legacy" if self.driver.registers.legacy else "modern",
            "ring": self.way.ring,
            "indirect": self.way.indirect,
            "features": list(self.driver.features),
            "lines": self.lines,
        }


def request(
    number: int,
    *,
    way: Way = Way(),
    count: int = 1,
    as_json: bool = False,
    show: Callable[[str], object] = print_line,
) -> str:
    """Send `number` to the test device `count` times, one after the other.

    Args:
        number: 0 to 255.
        way: how they get there.
        count: how often, from 1.
        as_json: show one JSON object at the end instead of the lines.
        show: takes each line.

    Returns:
        All that was shown.

    Raises:
        InvalidArgument: the number is not 0 to 255, or there is no such way.
        PeerError: the device did not answer as it should.
    """
    loop = OwnerLoop(clock=VirtualClock())
    session = _Session(TestDevice(), way, loop=loop, show=None if as_json else show)
    responses: list[TestResponse] = []
    for _ in range(count):
        responses.append(session.driver.request(number))
        session.check()
    facts = {"number": number, "count": count, "responses": [each._asdict() for each in responses]}
    return _result(session, facts, as_json=as_json, show=show)


def timer(
    ticks: int,
    *,
    first_after: float = 30.0,
    every: float = 1.0,
    real_time: bool = False,
    way: Way = Way(),
    as_json: bool = False,
    show: Callable[[str], object] = print_line,
) -> str:
    """Run the timer variant until the driver has got its answer to `ticks` ticks.

    Args:
        ticks: from 1.
        first_after: seconds to the first tick.
        every: seconds between ticks.
        real_time: wait for the time to pass instead of moving a virtual clock.
        way: how notifications and numbers get there.
        as_json: show one JSON object at the end instead of the lines.
        show: takes each line.

    Returns:
        All that was shown.

    Raises:
        InvalidArgument: a time that is no time, or there is no such way.
        DeviceNeedsReset: the device broke.
    """
    loop = OwnerLoop(clock=MonotonicClock() if real_time else VirtualClock())
    device = TestDevice(timer=True, first_after=first_after, every=every)
    session = _Session(device, way, loop=loop, show=None if as_json else show)
    driver = session.driver
    loop.run(until=lambda: driver.acknowledged >= ticks or driver.broken is not None or session.failed is not None)
    session.check()
    if driver.broken is not None:
        raise DeviceNeedsReset(str(driver.broken)) from driver.broken
    facts = {"ticks": ticks, "seconds": round(loop.clock.now(), 9)}
    return _result(session, facts, as_json=as_json, show=show)


def _result(session: _Session, facts: Mapping[str, object], *, as_json: bool, show: Callable[[str], object]) -> str:
    if not as_json:
        return "\n".join(session.lines)
    text = json.dumps({**facts, **session.facts()}, indent=2)
    show(text)
    return text
