"""The driver of the test device, in both variants: what the Linux driver in `guest/` does, as a model.

It prints the lines of the original's kernel console. Every request has a buffer of its own, and every used
buffer is acknowledged with a line of its own, however many share one interrupt.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from virtio_test._core import Policy
from virtio_test.config import ConfigLayout
from virtio_test.console import Console, print_line, signed
from virtio_test.errors import InvalidArgument, NoFeature, PeerError, QueueFull
from virtio_test.features import FeatureSet
from virtio_test.spec.status import Status
from virtio_test.spec.testdevice import CONFIG_FIELDS, COUNTER, FEATURE_NAMES, REQUEST, RESPONSE, TEXT

from .alloc import Arena
from .base import DRIVER_FEATURES, Driver
from .registers import Registers
from .request import Request

__all__ = ["TestDriver", "TestResponse", "build_request"]

_CAN_PRINT: Final = FeatureSet("CAN_PRINT", device=FEATURE_NAMES)
_MASK: Final = 0xFFFF_FFFF


class TestResponse(NamedTuple):
    """What the device answers, as numbers of 32 bits without sign."""

    __test__ = False  # a name that pytest would collect

    ret: int
    arg1: int
    arg2: int


def build_request(number: int) -> bytes:
    """The 48 bytes that the driver makes of a number from 0 to 255; it counts in a byte, so 255 is followed by 0.

    Raises:
        InvalidArgument: the number is not 0 to 255.
    """
    if not 0 <= number <= 255:
        raise InvalidArgument(f"the number is {number}, but it must be between 0 and 255")
    return REQUEST.pack(*((number + step) % 256 for step in range(4)), TEXT)


class TestDriver(Driver):
    """The driver of the test device.

    Args:
        registers: the device as the transport shows it.
        timer: the timer variant: answer each configuration change with a counter, take no requests.
        console: takes the lines; standard output by default.
        wanted: features of the ring to accept; CAN_PRINT is always accepted.
        queue_size: largest size of the queue.
        indirect: put every chain into an indirect table.
        policy: tolerances towards the device's used rings.
        arena: where rings and buffers lie.
        timeout: seconds of the loop's clock that waits take at most.
    """

    __test__ = False  # a name that pytest would collect

    def __init__(
        self,
        registers: Registers,
        *,
        timer: bool = False,
        console: Console = print_line,
        wanted: FeatureSet | None = None,
        queue_size: int | None = None,
        indirect: bool = False,
        policy: Policy = Policy.interop,
        arena: Arena | None = None,
        timeout: float = 10.0,
    ) -> None:
        super().__init__(
            registers,
            wanted=_CAN_PRINT | (DRIVER_FEATURES if wanted is None else wanted),
            layout=ConfigLayout(*CONFIG_FIELDS),
            queue_size=queue_size,
            indirect=indirect,
            policy=policy,
            arena=arena,
            timeout=timeout,
        )
        self.timer = timer
        self.console = console
        self.counter = 0
        self.acknowledged = 0
        self._num_pages = 0
        self._owes = False

    # --- requests -------------------------------------------------------------------------------------------

    def submit_number(self, number: int, *, publish: bool = True) -> Request:
        """Send one request and go on; its response is `parse(request.wait())`.

        Raises:
            NoFeature: the device offers no CAN_PRINT, or this is the timer variant: there is no request API.
            InvalidArgument: the number is not 0 to 255.
            QueueFull: no descriptors are free.
        """
        request = build_request(number)
        self._check_up(Status.DRIVER_OK)
        if self.timer:
            raise NoFeature("no request API: this is the timer variant of the driver")
        if "CAN_PRINT" not in self.features:
            raise NoFeature("no request API: the device does not offer CAN_PRINT")
        return self.submit(0, [request], [RESPONSE.size], publish=publish, on_done=self._request_done)

    def request(self, number: int, *, timeout: float | None = None) -> TestResponse:
        """Send one request and wait for its response.

        Raises:
            PeerError: the response is too short, did not come in time, or the device broke.
            NoFeature, InvalidArgument, QueueFull: as `submit_number`.
        """
        return self.parse(self.submit_number(number).wait(timeout=timeout))

    def request_many(self, numbers: Iterable[int]) -> list[TestResponse]:
        """Send as many as the queue holds at once, the rest as places get free; the responses in that order.

        Raises:
            PeerError, NoFeature, InvalidArgument: as `request`, for the first that fails.
            QueueFull: what was sent before is still in flight, and fills the queue.
        """
        requests: list[Request] = []
        for number in numbers:
            while True:
                try:
                    requests.append(self.submit_number(number, publish=False))
                except QueueFull:
                    self.flush(0)
                    waiting = next((request for request in requests if not request.done), None)
                    if waiting is None:
                        # The queue is full of what the device has never answered.
                        raise
                    waiting.wait()
                else:
                    break
        if requests:
            self.flush(0)
        return [self.parse(request.wait()) for request in requests]

    @staticmethod
    def parse(response: bytes) -> TestResponse:
        """The numbers in a response.

        Raises:
            PeerError: it is shorter than 12 bytes.
        """
        if len(response) < RESPONSE.size:
            raise PeerError(f"a response of {len(response)} bytes came, {RESPONSE.size} are expected")
        return TestResponse(*RESPONSE.unpack_from(response))

    def _request_done(self, request: Request) -> None:
        # Of what is lost nothing was written.
        if request.written < RESPONSE.size:
            return
        response = self.parse(request.data)
        self.acknowledged += 1
        self.console("virtio test_request_done get ack")
        self.console(f"virtio response ret is {signed(response.ret)}")
        self.console(f"virtio response arg1 is {signed(response.arg1)}")
        self.console(f"virtio response arg2 is {signed(response.arg2)}")

    # --- configuration changes ------------------------------------------------------------------------------

    def set_up(self) -> None:
        """See `Driver.set_up`."""
        self._num_pages = 0
        self._owes = False
        self._read_config()

    def config_changed(self) -> None:
        """See `Driver.config_changed`; the work itself is done in a turn of its own, as on a work queue."""
        if self.timer:
            self.console("virttest virttest_changed")
        self.loop.pend((self, "config work"), self._config_work)

    def _config_work(self) -> None:
        if not self.live:
            return
        self._read_config()
        if not self.timer:
            return
        self.console("virttest get config change")
        self._answer()

    def _answer(self) -> None:
        number = (self.counter + 1) & _MASK
        try:
            self.submit(0, [COUNTER.pack(number)], on_done=self._counter_done)
        except QueueFull:
            # The device has taken nothing for a whole ring: the next buffer that comes back makes room.
            self._owes = True
        else:
            self._owes = False
            self.counter = number

    def _counter_done(self, request: Request) -> None:
        if request.error is not None:
            return
        self.acknowledged += 1
        self.console("virttest get ack")
        if self._owes:
            self._answer()

    def _read_config(self) -> None:
        """Take over what the device wishes, and say so."""
        wish = self.read_field("num_pages")
        if wish != self._num_pages:
            self.write_field("actual", wish)
        assert isinstance(wish, int)
        self._num_pages = wish
