"""The test device: the device that the project began with, requests and timer as one device with a switch.

Theory
------
Queue 0 carries, as the device was made (all numbers little endian):

* **requests** (default): 48 readable bytes ``le32 type, arg1, arg2, arg3; char arg4[32]`` and 12 writable ones
  ``le32 ret, arg1, arg2``. The answer is arg1, arg2 and arg3 plus 100, modulo 2**32. Longer requests are read as
  far as they mean something, longer buffers are written as far as there is an answer.
* **counters** (``timer=True``): any number of le32, each of which makes one line, 1024 of a buffer at most. The
  device counts ticks: each prints, sets `num_pages` to its number and, when the driver is live, notifies a
  configuration change. The timer runs from `attach` on; a reset neither stops it nor sets the ticks back, and missed
  ticks are not made up.

However a request is framed makes no difference. What cannot be answered is completed with 0 bytes and counted:

* shorter than 48 bytes (timer: than 4): one line says so, `short` counts it;
* a response buffer below 12 bytes: the request is logged, nothing of the answer is written, `small` counts it;
* 1 to 3 bytes behind the last whole counter are ignored, `trailing` counts them;
* counters behind the first 1024 of one buffer make no line, `unshown` counts them: a driver that fills its whole
  queue with them would else keep the device for minutes.

The console prints C's ``%d``: numbers are shown as signed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final

from virtio_test.clock import Clock, Timer, to_nanoseconds
from virtio_test.config import ConfigLayout, ConfigSpace
from virtio_test.console import Console, print_line, shown, signed
from virtio_test.device import Bus
from virtio_test.errors import InvalidArgument, SavedStateError
from virtio_test.features import FeatureSet
from virtio_test.spec.ids import TEST_DEVICE_ID
from virtio_test.spec.testdevice import CONFIG_FIELDS, COUNTER, FEATURE_NAMES, QUEUE_SIZE, REQUEST, RESPONSE

from .base import BaseDevice, OnHandlerError

__all__ = ["CAN_PRINT", "CONFIG_LAYOUT", "TestCounters", "TestDevice"]

CAN_PRINT: Final = FeatureSet("CAN_PRINT", device=FEATURE_NAMES)
"""The device answers requests."""

CONFIG_LAYOUT: Final = ConfigLayout(*CONFIG_FIELDS)

_ADDED: Final = 100
_MAX_SHOWN: Final = 1024
_MASK: Final = 0xFFFF_FFFF


@dataclass(slots=True)
class TestCounters:
    """What the device has met since it was made.

    Attributes:
        requests: requests read, those with too small a response buffer included.
        short: requests with too few bytes, completed with 0.
        small: response buffers that were too small, completed with 0.
        counters: numbers that the driver queued (timer).
        trailing: bytes behind the last whole number (timer).
        unshown: numbers of those in `counters` that made no line (timer).
    """

    __test__ = False  # a name that pytest would collect

    requests: int = 0
    short: int = 0
    small: int = 0
    counters: int = 0
    trailing: int = 0
    unshown: int = 0

    def as_dict(self) -> dict[str, int]:
        """The counters by name."""
        return asdict(self)


class TestDevice(BaseDevice):
    """The test device.

    Args:
        timer: the timer variant instead of the request variant.
        first_after: seconds from `attach` to the first tick.
        every: seconds between ticks.
        console: takes the lines; standard output by default.
        device_id: virtio device id.
        can_print: offer CAN_PRINT, without which the driver has no request API.
        on_handler_error: what becomes of a request whose line the console refuses; see `BaseDevice`.

    Raises:
        InvalidArgument: a time that is no positive number.
    """

    __test__ = False  # a name that pytest would collect

    def __init__(
        self,
        *,
        timer: bool = False,
        first_after: float = 30.0,
        every: float = 1.0,
        console: Console = print_line,
        device_id: int = TEST_DEVICE_ID,
        can_print: bool = True,
        on_handler_error: OnHandlerError = "broken",
    ) -> None:
        to_nanoseconds(first_after, "first_after")
        if to_nanoseconds(every, "every") == 0:
            raise InvalidArgument(f"every is {every!r} s; it must be at least one nanosecond")
        super().__init__(
            device_id,
            handlers={0: self._counter if timer else self._request},
            queue_sizes=(QUEUE_SIZE,),
            features=CAN_PRINT if can_print else CAN_PRINT - CAN_PRINT,
            config=ConfigSpace(CONFIG_LAYOUT),
            on_handler_error=on_handler_error,
        )
        self.console = console
        self.timer = timer
        self.first_after = first_after
        self.every = every
        self.ticks = 0
        self.counters = TestCounters()
        self._timer: Timer | None = None
        self._clock: Clock | None = None
        self._remaining = first_after

    def __repr__(self) -> str:
        times = f", first_after={self.first_after!r}, every={self.every!r}" if self.timer else ""
        can_print = "" if "CAN_PRINT" in self.features else ", can_print=False"
        return f"TestDevice(timer={self.timer}{times}, device_id={self.device_id}{can_print})"

    # --- requests -------------------------------------------------------------------------------------------

    def kicked(self, queue_index: int) -> bool:
        """See `Device.kicked`; counts the response buffers that were too small."""
        queue = self._queues.get(queue_index)
        before = queue.counters.rejected if queue is not None else 0
        try:
            return super().kicked(queue_index)
        finally:
            if queue is not None:
                self.counters.small += queue.counters.rejected - before

    def _request(self, request: bytes) -> bytes | None:
        if len(request) < REQUEST.size:
            return self._too_short()
        kind, arg1, arg2, arg3, text = REQUEST.unpack_from(request)
        self.counters.requests += 1
        shown = text.split(b"\0", 1)[0].decode("ascii", "backslashreplace")
        for name, value in (
            ("type", signed(kind)),
            ("arg1", signed(arg1)),
            ("arg2", signed(arg2)),
            ("arg3", signed(arg3)),
            ("arg3", shown),
        ):
            self.console(f"QEMU_BACK_END: >>> get {name} [ {value} ] form the front end <<<")
        return RESPONSE.pack(*((argument + _ADDED) & _MASK for argument in (arg1, arg2, arg3)))

    def _counter(self, request: bytes) -> None:
        whole, trailing = divmod(len(request), COUNTER.size)
        if not whole:
            self._too_short()
            return
        self.counters.counters += whole
        self.counters.trailing += trailing
        shown = min(whole, _MAX_SHOWN)
        self.counters.unshown += whole - shown
        for (number,) in COUNTER.iter_unpack(request[: shown * COUNTER.size]):
            self.console(f"=========get virtio num:{signed(number)}")

    def _too_short(self) -> None:
        self.counters.short += 1
        self.console("Qemu Error: iov_to_buf function failed.")

    # --- timer ----------------------------------------------------------------------------------------------

    def attach(self, bus: Bus) -> None:
        """See `Device.attach`; the timer starts with the first bus and lives on when another follows."""
        super().attach(bus)
        if self.timer and self._clock is not bus.clock:
            self._remaining = self._left()
            self._arm(bus.clock)

    def detach(self) -> None:
        """See `Device.detach`; the time left is kept for a saved state, or for the next bus."""
        super().detach()
        self._remaining = self._left()
        if self._timer is not None:
            self._timer.stop()
        self._timer = None
        self._clock = None

    def _arm(self, clock: Clock) -> None:
        if self._timer is not None:
            self._timer.stop()
        self._clock = clock
        self._timer = Timer(clock, self._tick, first_after=self._remaining, every=self.every)

    def _left(self) -> float:
        remaining = self._timer.remaining if self._timer is not None else None
        return self._remaining if remaining is None else remaining

    def _tick(self) -> None:
        number = self.ticks
        self.ticks = (number + 1) & _MASK
        self.console(f"==============set config:{signed(number)}")
        # A value that stays the same (the first tick's 0) is a notification all the same.
        if not self.config.update(num_pages=number):
            self.notify_config_changed()

    # --- saved state ----------------------------------------------------------------------------------------

    def save(self) -> dict[str, object]:
        """The base's state (the configuration has `actual` and `event`), the variant, the ticks and the time left."""
        left = self._left() if self.timer else None
        return {**super().save(), "timer": self.timer, "ticks": self.ticks, "remaining": left}

    def check_state(self, state: Mapping[str, object]) -> None:
        """See `BaseDevice.check_state`."""
        super().check_state(state)
        if state["timer"] is not self.timer:
            raise SavedStateError(f"the saved state's timer is {shown(state['timer'])}, this device's is {self.timer}")
        ticks, remaining = state["ticks"], state["remaining"]
        if not isinstance(ticks, int) or isinstance(ticks, bool) or not 0 <= ticks <= _MASK:
            raise SavedStateError(f"the saved ticks {shown(ticks)} are no 32-bit number")
        if not self.timer:
            if remaining is not None:
                raise SavedStateError(f"the saved remaining time is {shown(remaining)}, and this device has no timer")
            return
        if isinstance(remaining, bool) or not isinstance(remaining, int | float):
            raise SavedStateError(f"the saved remaining time {shown(remaining)} is no number of seconds")
        try:
            to_nanoseconds(remaining, "the saved remaining time")
        except InvalidArgument as error:
            raise SavedStateError(str(error)) from None

    def apply_state(self, state: Mapping[str, object]) -> None:
        """See `BaseDevice.apply_state`; a running timer goes on with the saved time."""
        super().apply_state(state)
        ticks, remaining = state["ticks"], state["remaining"]
        assert isinstance(ticks, int)
        self.ticks = ticks
        if self.timer:
            assert isinstance(remaining, int | float)
            self._remaining = remaining
            if self._clock is not None:
                self._arm(self._clock)
