"""The entropy device (VIRTIO 1.4, 5.4): fills buffers with random bytes from a callable.

A buffer gets `limit` bytes at most, so a driver that offers gigabytes cannot keep the device from anything else; the
used length says how many it got (5.4.6.2 allows less than the entire buffer). A buffer with nothing to write to, or
with something to read in it (5.4.6.1), is counted in `odd`: the former gets nothing, the latter is filled all the same.

The operating system's bytes can be given out without Python (`_core.EntropyService`), in the owner loop or in a thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from virtio_test._core import Chain, EntropyService
from virtio_test.errors import HandlerError, InvalidArgument
from virtio_test.spec.ids import DeviceId
from virtio_test.spec.rng import REQUEST_QUEUE

from .base import OnHandlerError
from .native import NativeDevice, WaitStrategy, threads

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["RngDevice"]

_QUEUE_SIZE: Final = 8
_LIMIT: Final = 64 << 10


class RngDevice(NativeDevice):
    """The entropy device.

    Args:
        source: ``source(count)`` gives 1 to `count` bytes; the operating system's, when none is given.
        limit: bytes that one buffer gets at most.
        queue_size: largest size of the queue.
        device_id: virtio device id.
        transitional: serve a driver without VERSION_1 too.
        on_handler_error: what becomes of a request when the source fails; see `BaseDevice`.
        native: fill buffers without Python; the source is the operating system then.
        wait: how the thread of a native device waits; None serves in the owner loop.
        spin: microseconds that an ``adaptive`` one looks at the ring.
        cpus: the CPU that its thread runs on is the first of these; any, when None.

    Raises:
        InvalidArgument: `limit` is below 1, or a native device has another source.
    """

    def __init__(
        self,
        *,
        source: Callable[[int], Buffer] = os.urandom,
        limit: int = _LIMIT,
        queue_size: int = _QUEUE_SIZE,
        device_id: int = DeviceId.ENTROPY,
        transitional: bool = True,
        on_handler_error: OnHandlerError = "broken",
        native: bool = False,
        wait: WaitStrategy | None = None,
        spin: float = 50.0,
        cpus: Sequence[int] | None = None,
    ) -> None:
        if native and source is not os.urandom:
            raise InvalidArgument("a native device has the operating system's random bytes, and no source of its own")
        if limit < 1:
            raise InvalidArgument(f"limit is {limit}; a buffer gets at least one byte")
        self._native = EntropyService(limit=limit) if native else None
        super().__init__(
            device_id,
            services={} if self._native is None else {(REQUEST_QUEUE,): self._native},
            threads=threads(native=native, wait=wait, spin=spin, cpus=cpus),
            chains={REQUEST_QUEUE: self._fill} if self._native is None else {},
            queue_sizes=(queue_size,),
            transitional=transitional,
            on_handler_error=on_handler_error,
        )
        self.source = source
        self.limit = limit
        self._delivered = 0
        self._odd = 0

    @property
    def delivered(self) -> int:
        """Bytes given out since the device was made."""
        return self._delivered if self._native is None else self._native.counters["delivered"]

    @property
    def odd(self) -> int:
        """Buffers that a driver must not put in."""
        return self._odd if self._native is None else self._native.counters["odd"]

    def _fill(self, chain: Chain) -> int:
        if chain.readable or not chain.writable:
            self._odd += 1
        wanted = min(chain.writable, self.limit)
        if not wanted:
            return 0
        data = memoryview(self.source(wanted)).cast("B")
        if not 1 <= len(data) <= wanted:
            raise HandlerError(f"the source of random bytes gave {len(data)} bytes, asked for 1 to {wanted}")
        self._delivered += len(data)
        return chain.write(data)
