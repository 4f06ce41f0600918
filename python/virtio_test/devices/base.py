"""`BaseDevice`: a device made from handlers, one per virtqueue.

Theory
------
A handler is written in one of three ways; every way passes the same validation in the core:

* a plain callable ``bytes → bytes``: once per request; None is a response of 0 bytes;
* `batched(handler, …)`: ``handler(requests, responses)`` once for many requests of one size;
* `kept(handler)`: ``handler(chain)`` takes the chain, and `device.complete(chain, data)` answers it later, from
  any thread. A device with such a queue does not offer IN_ORDER.

A queue without a handler is left alone: its buffers stay available.

**One `kicked`** takes `BUDGET` chains or `WEIGHT` bytes, whatever comes first, and leaves the rest to the next turn of
the loop: a driver that makes buffers available as fast as they are used keeps nobody else waiting. One request alone
may be larger, and a handler whose request is more work than its bytes show says so (`charge`).

**A handler that raises** makes one log entry with its traceback, and then ``broken`` latches the queue and
reports the device broken, or ``complete0`` answers the request with 0 bytes and goes on; so it is with a request that
cannot be read. `KeyboardInterrupt` and `SystemExit` are not errors of a handler: they leave the loop, the request goes
back, and its handler is asked again when the loop goes on.

**A queue that stops with kept chains**: each is offered to `cancel`, newest first. True means that the device
lets go of it: it goes back to the ring if nothing was written and no later chain is out, else it is completed
with 0 bytes. What the device does not let go of is waited for, `cancel_seconds` at most; then the queue is
latched. Chains that this very thread would complete later must be let go of: the loop stands still meanwhile.

**While the device is held** (`Holdable`) `complete` keeps the answer, and writes it when the device is released.
A queue that stops meanwhile takes all its kept chains back, answers that wait or not, and hands them out again when it
runs: nothing is written. What a handler's own thread writes to a chain without `complete` is its own affair.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from virtio_test._core import Chain, DeviceQueue
from virtio_test.config import ConfigLayout, ConfigSpace
from virtio_test.console import shown
from virtio_test.device import RING_FEATURES, Bus
from virtio_test.errors import (
    HandlerError,
    InvalidArgument,
    QueueViolation,
    SavedStateError,
    StaleChain,
    StaleMemory,
    StateError,
)
from virtio_test.features import FeatureSet, Requirements

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["BUDGET", "WEIGHT", "BaseDevice", "Batched", "Kept", "batched", "kept"]

RequestHandler: TypeAlias = "Callable[[bytes], Buffer | None]"
BatchHandler: TypeAlias = Callable[[memoryview, memoryview], object]
ChainHandler: TypeAlias = Callable[[Chain], object]
OnHandlerError: TypeAlias = Literal["broken", "complete0"]

_NO_REQUIREMENTS: Final[Requirements] = MappingProxyType({})
DEFAULT_QUEUE_SIZE: Final = 128
BUDGET: Final = 256
"""Chains that one `kicked` handles at most before the loop gets to something else."""

WEIGHT: Final = 0x80000
"""Bytes that it moves at most; with the chain that reaches this it ends."""


@dataclass(frozen=True, slots=True)
class Batched:
    """A handler for many requests at once; see `batched`."""

    handler: BatchHandler
    request_size: int
    response_size: int
    limit: int = BUDGET


@dataclass(frozen=True, slots=True)
class Kept:
    """A handler that takes chains and completes them later; see `kept`."""

    handler: ChainHandler


def batched(handler: BatchHandler, *, request_size: int, response_size: int, limit: int = BUDGET) -> Batched:
    """``handler(requests, responses)`` for up to `limit` requests: rows of the two given sizes in bytes.

    There are fewer where they would be more than `WEIGHT` bytes together.

    `responses` is writable and zeroed. Shorter requests and smaller buffers are completed with 0 bytes.
    """
    if request_size < 0 or response_size < 0 or not 1 <= limit <= 32768:
        raise InvalidArgument(
            f"a batch needs sizes from 0 and a limit from 1 to 32768, not {request_size}, {response_size}, {limit}"
        )
    return Batched(handler, request_size, response_size, limit)


def kept(handler: ChainHandler) -> Kept:
    """``handler(chain)`` takes each chain; `BaseDevice.complete` answers it when it likes."""
    return Kept(handler)


class BaseDevice:
    """A device from handlers. Use it as it is, or as the base of a class of one's own.

    Args:
        device_id: virtio device id, 1 to 65535.
        handlers: queue index to handler.
        queue_sizes: largest size of each queue; 128 for each index up to the highest handler when None.
        features: feature bits of the class; the ring's bits are added.
        config: configuration space; empty when None.
        requires: features of the class that presuppose others.
        transitional: serve a driver without VERSION_1 too, by the legacy rules.
        on_handler_error: ``broken`` or ``complete0``.
        cancel_seconds: real seconds that a stopping queue waits for chains the device does not let go of.
    """

    state_version: int = 1

    def __init__(
        self,
        device_id: int,
        *,
        handlers: Mapping[int, RequestHandler | Batched | Kept],
        queue_sizes: Sequence[int] | None = None,
        features: FeatureSet | None = None,
        config: ConfigSpace | None = None,
        requires: Requirements = _NO_REQUIREMENTS,
        transitional: bool = True,
        on_handler_error: OnHandlerError = "broken",
        cancel_seconds: float = 1.0,
    ) -> None:
        if not 1 <= device_id <= 0xFFFF:
            raise InvalidArgument(f"device id {device_id} is not 1 to 65535")
        if on_handler_error not in ("broken", "complete0"):
            raise InvalidArgument(f"on_handler_error is {on_handler_error!r}: say 'broken' or 'complete0'")
        count = max(handlers, default=-1) + 1
        sizes = (DEFAULT_QUEUE_SIZE,) * count if queue_sizes is None else tuple(queue_sizes)
        if any(not 1 <= size <= 32768 for size in sizes):
            raise InvalidArgument(f"queue sizes {sizes} are not all 1 to 32768")
        if any(not 0 <= index < len(sizes) for index in handlers):
            raise InvalidArgument(f"handlers for queues {sorted(handlers)}, but the device has {len(sizes)}")
        offered = RING_FEATURES if features is None else features | RING_FEATURES
        if any(isinstance(handler, Kept) for handler in handlers.values()):
            offered = offered - FeatureSet("IN_ORDER")
        self.device_id = device_id
        self.requires: Requirements = requires
        self.transitional = transitional
        self.features = offered
        self.queue_sizes: Sequence[int] = sizes
        self.config = config if config is not None else ConfigSpace(ConfigLayout())
        self.on_handler_error: OnHandlerError = on_handler_error
        self.cancel_seconds = cancel_seconds
        self.handler_errors = 0
        self._handlers = dict(handlers)
        self._bus: Bus | None = None
        self._negotiated: FeatureSet | None = None
        self._queues: dict[int, DeviceQueue] = {}
        # Kept chains by identity, oldest first; the flag says that a thread is completing the chain just now.
        self._kept: dict[int, tuple[Chain, DeviceQueue, bool]] = {}
        self._settled = threading.Condition()
        self._held = False
        # Answers that came meanwhile, by the identity of their chain.
        self._late: dict[int, tuple[Chain, bytes]] = {}
        # Rings that broke in a completion, by queue.
        self._gone: dict[int, QueueViolation] = {}
        # What the handlers of the present `kicked` have charged, and the queue whose `process` counts it as well.
        self._charged = 0
        self._processing: DeviceQueue | None = None

    def __repr__(self) -> str:
        running = sorted(self._queues)
        return f"<{type(self).__name__} id {self.device_id}, queues {list(self.queue_sizes)}, running {running}>"

    # --- what a transport calls -----------------------------------------------------------------------------

    def attach(self, bus: Bus) -> None:
        """See `Device.attach`. From now on a changed configuration field is notified by itself."""
        self._bus = bus
        self.config.on_change = self.notify_config_changed

    def detach(self) -> None:
        """See `Device.detach`."""
        self.reset()
        self._held = False
        self.config.on_change = None
        self._bus = None

    def activate(self, features: FeatureSet) -> None:
        """See `Device.activate`."""
        self._negotiated = features

    def start_queue(self, queue: DeviceQueue) -> None:
        """See `Device.start_queue`."""
        if queue.index >= len(self.queue_sizes):
            raise InvalidArgument(f"queue {queue.index} of a device with {len(self.queue_sizes)}")
        self._queues[queue.index] = queue
        self._gone.pop(queue.index, None)

    def kicked(self, queue_index: int) -> bool:
        """See `Device.kicked`."""
        queue = self._queues.get(queue_index)
        handler = self._handlers.get(queue_index)
        if queue is None or handler is None:
            return False
        try:
            if gone := self._gone.pop(queue_index, None):
                raise gone
            queue.disable_kicks()
            return self._handle(queue, handler) >= BUDGET or queue.enable_kicks()
        except QueueViolation as error:
            self.bus.broken(error)
            return False

    def stop_queue(self, queue_index: int) -> None:
        """See `Device.stop_queue`."""
        # `complete` asks under the same lock whether the queue is one of ours: its answer is late by now, or never.
        with self._settled:
            queue = self._queues.pop(queue_index, None)
        if queue is None:
            return
        queue.stop()
        with self._settled:
            mine = [chain for chain, of, _ in self._kept.values() if of is queue]
        for chain in reversed(mine):
            # An answer that waits will not be written any more; whoever gave it has let go of the chain.
            if self._late.pop(id(chain), None) is not None or self.cancel(chain):
                self._give_back(queue, chain)
        with self._settled:
            done = self._settled.wait_for(lambda: not self._keeps(queue), self.cancel_seconds)
            if not done:
                self._kept = {key: each for key, each in self._kept.items() if each[1] is not queue}
        if not done:
            self._fail(queue, "DeviceStuck", f"chains were not completed within {self.cancel_seconds} s of the stop")

    def reset(self) -> None:
        """See `Device.reset`."""
        self._queues.clear()
        self._negotiated = None
        with self._settled:
            self._kept.clear()
            self._late.clear()
            self._settled.notify_all()

    def hold(self) -> None:
        """See `Holdable.hold`; waits for completions under way, `cancel_seconds` at most."""
        with self._settled:
            self._held = True
            self._settled.wait_for(lambda: not any(busy for _, _, busy in self._kept.values()), self.cancel_seconds)

    def release(self) -> None:
        """See `Holdable.release`; what was completed meanwhile is written."""
        with self._settled:
            self._held = False
            late, self._late = list(self._late.values()), {}
        for chain, data in late:
            self.complete(chain, data)

    def save(self) -> dict[str, object]:
        """See `Device.save`: the version, the device id, the configuration space, and what a subclass adds."""
        return {"version": self.state_version, "device_id": self.device_id, "config": self.config.save()}

    def restore(self, state: Mapping[str, object]) -> None:
        """See `Device.restore`. A subclass with more to restore extends `check_state` and `apply_state`."""
        self.check_state(state)
        self.apply_state(state)

    # --- what a subclass may extend -------------------------------------------------------------------------

    def check_state(self, state: Mapping[str, object]) -> None:
        """Refuse a bad state and change nothing.

        Raises:
            SavedStateError: malformed, of another version or of another device.
        """
        expected = set(self.save())
        if set(state) != expected:
            raise SavedStateError(f"a saved state has the fields {sorted(expected)}, this one {shown(sorted(state))}")
        for name, own in (("version", self.state_version), ("device_id", self.device_id)):
            if state[name] != own or isinstance(state[name], bool):
                raise SavedStateError(f"the saved state's {name} is {shown(state[name])}, this device's is {own}")
        ConfigSpace(self.config.layout).restore(state["config"])

    def apply_state(self, state: Mapping[str, object]) -> None:
        """Take over a state that `check_state` has passed."""
        self.config.restore(state["config"])

    def cancel(self, chain: Chain) -> bool:
        """Whether the device lets go of a kept chain whose queue stops; by default if it has written nothing."""
        return chain.written == 0

    # --- what a device's own code uses ----------------------------------------------------------------------

    @property
    def bus(self) -> Bus:
        """The bus of the transport.

        Raises:
            StateError: not attached yet.
        """
        if self._bus is None:
            raise StateError("the device has no bus yet: a transport or Loopback attaches it")
        return self._bus

    @property
    def active(self) -> bool:
        """Whether the driver is live (DRIVER_OK)."""
        return self._negotiated is not None

    @property
    def negotiated(self) -> FeatureSet:
        """The negotiated features; empty before the driver is live. It knows the names of the class."""
        return self._negotiated if self._negotiated is not None else self.features - self.features

    def notify_config_changed(self) -> None:
        """Tell the driver, if it is live, to look at the configuration space again."""
        if self.active:
            self.bus.config_changed()

    def queue(self, index: int) -> DeviceQueue:
        """The running queue `index`.

        Raises:
            StateError: it does not run.
        """
        queue = self._queues.get(index)
        if queue is None:
            raise StateError(f"queue {index} does not run")
        return queue

    def charge(self, count: int) -> None:
        """For a handler: its request is as much work as `count` bytes of buffers more."""
        self._charged += count
        if self._processing is not None:
            self._processing.charge(count)

    @property
    def kept(self) -> list[Chain]:
        """The chains that `kept` handlers have taken and nobody has completed, oldest first."""
        with self._settled:
            return [chain for chain, _, _ in self._kept.values()]

    def complete(self, chain: Chain, data: Buffer = b"") -> bool:
        """Answer a kept chain with `data` and notify the driver if it wants to be. From any thread.

        Data longer than the writable part, or for a buffer that is not mapped any more, is not written: the chain is
        completed with 0 bytes. While the device is held the answer waits.

        Returns:
            False when the chain is no longer ours: completed before, given back, or lost with its queue.

        What raises (`data` that shows no bytes, an interrupt) leaves the chain kept, for another call to complete.
        """
        with self._settled:
            entry = self._kept.get(id(chain))
            if entry is None or entry[2] or id(chain) in self._late:
                return False
            queue = entry[1]
            if self._held and queue in self._queues.values():
                self._late[id(chain)] = (chain, bytes(data))
                return True
            if self._held:
                # Its queue stops, and waits for it: the answer cannot be written, so it is asked again.
                del self._kept[id(chain)]
                self._put_back(queue, chain)
                self._settled.notify_all()
                return False
            self._kept[id(chain)] = (chain, queue, True)
        written = False
        try:
            fits = memoryview(data).nbytes <= chain.writable
            if fits:
                chain.write(data)
            written = True
            done = self._push(queue, chain, None if fits else 0)
        except StaleChain:
            written = True
            return False
        except StaleMemory:
            # The driver's side has taken the buffer away under us: there is nothing to write to.
            written = True
            done = self._push(queue, chain, 0)
        finally:
            with self._settled:
                if written or id(chain) not in self._kept:
                    self._kept.pop(id(chain), None)
                else:
                    self._kept[id(chain)] = (chain, queue, False)
                self._settled.notify_all()
        return done

    def _push(self, queue: DeviceQueue, chain: Chain, written: int | None) -> bool:
        """Complete and notify, in any thread. That the ring has gone is reported in the owner loop, by `kicked`."""
        try:
            done = queue.push(chain, written)
            queue.signal()
        except QueueViolation as error:
            self._gone[queue.index] = error
            return False
        return done

    # --- inside ---------------------------------------------------------------------------------------------

    def _handle(self, queue: DeviceQueue, handler: RequestHandler | Batched | Kept) -> int:
        """Run the handler over what is available, as far as the bounds allow; how many chains were taken.

        `BUDGET` says that a bound was reached; less, that the ring has to be looked at once more.
        """
        if isinstance(handler, Kept):
            return self._take(queue, handler)
        if isinstance(handler, Batched):
            return self._batch(queue, handler)
        try:
            self._processing = queue
            return queue.process(handler, limit=BUDGET, max_bytes=WEIGHT)
        except Exception as error:
            if queue.latched is not None:
                raise
            # Mostly one; two, when memory for an earlier response had gone too.
            self._handler_failed(queue, error, list(iter(queue.take_failed, None)))
            return BUDGET
        except BaseException:
            # The newest is the one whose handler was interrupted; one before it was answered, and its memory had gone.
            for number, chain in enumerate(iter(queue.take_failed, None)):
                if number == 0:
                    self._put_back(queue, chain)
                else:
                    with suppress(StaleChain, QueueViolation):
                        queue.push(chain, 0)
            raise
        finally:
            self._processing = None

    def _batch(self, queue: DeviceQueue, batch: Batched) -> int:
        rows, answered = 0, False
        limit = min(batch.limit, max(1, WEIGHT // max(1, batch.request_size + batch.response_size)))

        def counted(requests: memoryview, responses: memoryview) -> None:
            nonlocal rows, answered
            rows = max(1, len(requests) // max(1, batch.request_size))
            batch.handler(requests, responses)
            answered = True

        while True:
            try:
                done = queue.process_batch(
                    counted, request_size=batch.request_size, response_size=batch.response_size, limit=limit
                )
            except Exception as error:
                if queue.latched is not None:
                    raise
                unread = not rows and isinstance(error, StaleMemory)
                if unread and limit > 1:
                    # One that cannot be read keeps all others from the handler: those before it go one by one.
                    limit = 1
                    continue
                # The core has put the whole batch back, unless it was answered: take what has failed out of the ring.
                count = 0 if answered else rows + unread
                failed = [queue.pop() for _ in range(count)] if self.on_handler_error == "complete0" else []
                self._handler_failed(queue, error, failed)
                return BUDGET
            return BUDGET if done >= limit else done

    def _take(self, queue: DeviceQueue, keeper: Kept) -> int:
        self._charged = 0
        moved = 0
        for taken in range(BUDGET):
            if moved + self._charged >= WEIGHT:
                return BUDGET
            chain = queue.pop()
            if chain is None:
                return taken
            # What it will write is for whoever completes it to count.
            moved += chain.readable
            with self._settled:
                self._kept[id(chain)] = (chain, queue, False)
            try:
                keeper.handler(chain)
            except Exception as error:  # noqa: BLE001 - logged with its traceback; the server lives
                with self._settled:
                    # Not while another thread is about to complete it.
                    entry = self._kept.get(id(chain))
                    still_ours = entry is not None and not entry[2]
                    if still_ours:
                        del self._kept[id(chain)]
                self._handler_failed(queue, error, [chain] if still_ours else [])
                return BUDGET
            except BaseException:
                with self._settled:
                    entry = self._kept.get(id(chain))
                    if entry is not None and not entry[2]:
                        del self._kept[id(chain)]
                        self._put_back(queue, chain)
                raise
        return BUDGET

    def _handler_failed(self, queue: DeviceQueue, error: Exception, failed: Sequence[Chain | None]) -> None:
        """Log it once, then do what `on_handler_error` says about the request that `failed`."""
        # Loaded only here: importing the package must stay cheap.
        import logging

        self.handler_errors += 1
        logging.getLogger("virtio_test.device").error(
            "the handler of queue %d raised; %s", queue.index, self.on_handler_error, exc_info=error
        )
        if self.on_handler_error == "broken":
            self._fail(queue, "HandlerFailed", f"the handler raised {type(error).__name__}: {error}", cause=error)
            return
        for chain in failed:
            if chain is not None:
                queue.push(chain, 0)
        queue.signal()

    def _fail(self, queue: DeviceQueue, rule: str, message: str, *, cause: Exception | None = None) -> None:
        """Break the queue by our own decision: the driver has done nothing wrong."""
        queue.latch(QueueViolation(rule, "2.1.2", message, queue=queue.index))
        error = HandlerError(f"queue {queue.index}: {message}")
        error.__cause__ = cause
        self.bus.broken(error)

    def _keeps(self, queue: DeviceQueue) -> bool:
        return any(of is queue for _, of, _ in self._kept.values())

    def _put_back(self, queue: DeviceQueue, chain: Chain) -> None:
        # Whoever had it may have completed it past our books.
        with suppress(StaleChain):
            queue.put_back(chain)

    def _give_back(self, queue: DeviceQueue, chain: Chain) -> None:
        with self._settled:
            entry = self._kept.get(id(chain))
            if entry is None or entry[2]:
                return
            del self._kept[id(chain)]
            if self._held:
                self._put_back(queue, chain)
                return
        if chain.written == 0:
            try:
                queue.unpop(chain)
            except (StateError, StaleChain):
                # A later chain is still out or was completed, or the queue was reset: it cannot be offered again.
                pass
            else:
                return
        queue.push(chain, 0)
        queue.signal()
