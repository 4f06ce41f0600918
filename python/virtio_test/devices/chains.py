"""`ChainDevice`: a device whose handlers take a whole chain and have answered it when they return.

Theory
------
`BaseDevice` hands a request out as bytes, or lets a device keep chains. Block devices, consoles and entropy sources
need neither: a request can be larger than we want to hold at once, and its answer depends on how large the two parts
of the chain are, but it is there when the handler returns. So the handler gets the chain, copies piece by piece, and
says how many bytes are used.

Nothing is kept, so buffers are used in the order in which they came and the device offers **IN_ORDER**, which a device
with `kept` handlers cannot.

One `kicked` takes as much as `base` says, counted by the buffers that are offered. One chain alone may be larger: that
much a driver can always ask for.

**Memory that goes away** under a handler is no error of the handler: the chain is completed with 0 bytes, after
`lost` could say something in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Final, TypeAlias

from virtio_test._core import Chain, DeviceQueue
from virtio_test.config import ConfigSpace
from virtio_test.errors import QueueViolation, StaleChain, StaleMemory
from virtio_test.features import FeatureSet, Requirements

from .base import BUDGET, WEIGHT, BaseDevice, OnHandlerError

__all__ = ["CHUNK", "ChainDevice", "DirectHandler"]

DirectHandler: TypeAlias = Callable[[Chain], int]
"""Takes a chain and returns how many bytes of its writable part are used."""

CHUNK: Final = 256 << 10
"""Bytes that a handler holds at once; larger requests are copied in pieces of this size."""

_NO_REQUIREMENTS: Final[Requirements] = MappingProxyType({})


class ChainDevice(BaseDevice):
    """A device from handlers that answer whole chains at once.

    Args:
        device_id: virtio device id, 1 to 65535.
        chains: queue index to handler.
        queue_sizes: largest size of each queue.
        features: feature bits of the class; the ring's bits are added.
        config: configuration space; empty when None.
        requires: features of the class that presuppose others.
        transitional: serve a driver without VERSION_1 too, by the legacy rules.
        on_handler_error: ``broken`` or ``complete0``, as for `BaseDevice`.
    """

    def __init__(
        self,
        device_id: int,
        *,
        chains: Mapping[int, DirectHandler],
        queue_sizes: Sequence[int],
        features: FeatureSet | None = None,
        config: ConfigSpace | None = None,
        requires: Requirements = _NO_REQUIREMENTS,
        transitional: bool = True,
        on_handler_error: OnHandlerError = "broken",
    ) -> None:
        super().__init__(
            device_id,
            handlers={},
            queue_sizes=queue_sizes,
            features=features,
            config=config,
            requires=requires,
            transitional=transitional,
            on_handler_error=on_handler_error,
        )
        self._chains = dict(chains)

    def kicked(self, queue_index: int) -> bool:
        """See `Device.kicked`."""
        queue = self._queues.get(queue_index)
        handler = self._chains.get(queue_index)
        if queue is None or handler is None:
            return False
        queue.disable_kicks()
        try:
            more = self._serve(queue, handler)
        except QueueViolation as error:
            self.bus.broken(error)
            return False
        return more or queue.enable_kicks()

    def lost(self, chain: Chain) -> None:
        """The memory of `chain` has gone, at least in part; it is completed with 0 bytes next."""

    def _serve(self, queue: DeviceQueue, handler: DirectHandler) -> bool:
        """Answer what is available; whether it stopped at a bound. The driver is told once, at the end."""
        left = WEIGHT
        try:
            for _ in range(BUDGET):
                chain = queue.pop()
                if chain is None:
                    return False
                self._charged = 0
                try:
                    used = handler(chain)
                except (StaleMemory, StaleChain):
                    self._let_go(queue, chain)
                except Exception as error:  # noqa: BLE001 - logged with its traceback; the server lives
                    self._handler_failed(queue, error, [chain])
                    return True
                except BaseException:
                    self._put_back(queue, chain)
                    raise
                else:
                    queue.push(chain, used)
                left -= chain.readable + chain.writable + self._charged
                if left <= 0:
                    return True
        finally:
            queue.signal()
        return True

    def _let_go(self, queue: DeviceQueue, chain: Chain) -> None:
        with suppress(StaleMemory, StaleChain):
            try:
                self.lost(chain)
            except (StaleMemory, StaleChain):
                raise
            except BaseException:
                self._put_back(queue, chain)
                raise
        queue.push(chain, 0)
