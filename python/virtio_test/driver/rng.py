"""The driver of an entropy device (VIRTIO 1.4, 5.4): asks for random bytes and counts what it gets."""

from __future__ import annotations

from typing import Final

from virtio_test.errors import AnswerViolation, InvalidArgument
from virtio_test.spec.rng import REQUEST_QUEUE

from .base import Driver
from .request import Request

__all__ = ["RngDriver"]

_BUFFER: Final = 4096


class RngDriver(Driver):
    """The driver of an entropy device; its arguments are those of `Driver`."""

    def submit_read(self, count: int) -> Request:
        """Offer a buffer of `count` bytes; `parse(request.wait())` are 1 to `count` random ones.

        Raises:
            InvalidArgument: `count` is below 1.
            QueueFull: no descriptors are free.
        """
        return self.submit(REQUEST_QUEUE, [], [count])

    @staticmethod
    def parse(response: bytes) -> bytes:
        """The random bytes of a response.

        Raises:
            AnswerViolation: `NoRandomBytes` (5.4.6.2), there are none.
        """
        if not response:
            raise AnswerViolation("NoRandomBytes", "5.4.6.2", "a buffer came back empty", queue=REQUEST_QUEUE)
        return response

    def read(self, count: int, *, timeout: float | None = None) -> bytes:
        """`count` random bytes, in as many requests as the device makes of it; `timeout` in seconds for each.

        Raises:
            InvalidArgument: `count` is negative.
            PeerError: a buffer came back empty, did not come back in time, or the device broke.
        """
        if count < 0:
            raise InvalidArgument(f"{count} random bytes")
        data = bytearray()
        while len(data) < count:
            data += self.parse(self.submit_read(min(_BUFFER, count - len(data))).wait(timeout=timeout))
        return bytes(data)
