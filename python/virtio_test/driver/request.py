"""`Request`: one chain that a driver has given to the device, until it comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from virtio_test.errors import StateError

if TYPE_CHECKING:
    from .base import Driver

__all__ = ["Request"]


@dataclass(eq=False, slots=True)
class Request:
    """One chain in flight, with buffers of its own that nobody else uses until it is back.

    Attributes:
        driver: whose it is.
        queue_index: the virtqueue that it is in.
        readable: (address, length) of what the device reads.
        writable: (address, length) of what the device may write.
        on_done: called once, in the owner loop, when it is back or lost.
        token: the core's name for it.
        done: whether it is back or lost; this changes once.
        written: bytes that the device says it wrote.
        error: why it is lost; None when it came back.
    """

    driver: Driver = field(repr=False)
    queue_index: int
    readable: list[tuple[int, int]] = field(repr=False)
    writable: list[tuple[int, int]] = field(repr=False)
    on_done: Callable[[Request], object] | None = field(default=None, repr=False)
    token: int = -1
    done: bool = False
    written: int = 0
    error: Exception | None = None
    data: bytes = field(default=b"", repr=False)

    @property
    def response(self) -> bytes:
        """The bytes that the device wrote, as far as it says that it wrote.

        Raises:
            StateError: not back yet.
            Exception: `error`, when it is lost.
        """
        if not self.done:
            raise StateError(f"the request {self.token} of queue {self.queue_index} is still in flight: wait() for it")
        if self.error is not None:
            # Many requests are lost by one error, which would keep a trace of each look at it.
            raise self.error.with_traceback(None)
        return self.data

    def wait(self, *, timeout: float | None = None) -> bytes:
        """Run the loop until the response is there; `timeout` in seconds, the driver's own when None.

        Raises:
            PeerTimeout: the device did not answer; the request is still in flight.
            StateError: called from inside the loop, where `on_done` is the way.
            Exception: `error`, when it is lost.
        """
        if not self.done:
            self.driver.run_until(lambda: self.done, f"the answer to request {self.token}", timeout=timeout)
        return self.response

    def finish(self, *, written: int = 0, data: bytes = b"", error: Exception | None = None) -> None:
        """Back or lost: the driver says so, once; anything after that has no effect."""
        if self.done:
            return
        self.done, self.written, self.data, self.error = True, written, data, error
        if self.on_done is not None:
            self.on_done(self)
