"""`Driver`: the guest driver model, over any transport's registers.

Theory
------
A driver is made of three things. **Bring-up** is the sequence of VIRTIO 1.4, 3.1.1, each step read back where
the specification says so; a step that fails sets FAILED and raises. **Requests** are chains with buffers of
their own: the device owns them from `submit` until they come back through the ring, or until the device has
been reset. So a request that is lost is finished at once, and its memory returns to the arena only at the reset.
**Interrupts** are turns of the owner loop. One may stand for many used buffers: all are taken, and looked for
once more after calls are enabled again. A configuration change that comes before bring-up has ended is kept
until then.

A device that breaks (DEVICE_NEEDS_RESET, a broken rule in a used ring) finishes everything in flight with that
error, each request once. `initialize()` starts anew.

**A suspended device** (3.4) keeps what is in flight. The driver gives it nothing, and looks at nothing that it gives:
interrupts that still come before it is suspended are kept until the resume, so `on_done` may always submit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from types import MappingProxyType
from typing import Final

from virtio_test._core import DriverQueue, Policy, QueueConfig, RingLayout
from virtio_test.clock import Timer
from virtio_test.config import ConfigLayout
from virtio_test.device import RING_FEATURES
from virtio_test.errors import (
    DeviceNeedsReset,
    InvalidArgument,
    NoFeature,
    PeerError,
    PeerTimeout,
    QueueViolation,
    StateError,
    StatusViolation,
    VirtioTestError,
)
from virtio_test.features import FeatureSet, Requirements, negotiate
from virtio_test.spec.status import Status
from virtio_test.status import check_read_back

from .alloc import Arena
from .registers import Registers
from .request import Request

__all__ = ["DRIVER_FEATURES", "Driver"]

DRIVER_FEATURES: Final = RING_FEATURES | FeatureSet("SUSPEND")
"""What a driver accepts beside the features of its class, when it is offered and nothing else was asked for."""

_CONFIG_TRIES: Final = 100
_INDIRECT_ENTRIES: Final = 16
_LEGACY_ALIGN: Final = 4096
_POLL_SECONDS: Final = 0.001


class Driver:
    """A driver for one device. Use it as it is, or as the base of a class of one's own.

    Args:
        registers: the device as the transport shows it.
        wanted: features to accept when offered; `DRIVER_FEATURES` when None.
        required: features without which `initialize` fails.
        layout: the configuration space, for `read_field` and `write_field`.
        queue_size: largest size of a queue; the device's own limit when None.
        indirect: put every chain into an indirect table, where INDIRECT_DESC is negotiated.
        policy: tolerances towards the device's used rings.
        arena: where rings and buffers lie; the largest writable region of the memory when None.
        timeout: seconds of the loop's clock that waits take at most.

    Attributes:
        requires: features of the class that presuppose others; none is accepted without them (2.2.1).
    """

    requires: Requirements = MappingProxyType({})

    def __init__(
        self,
        registers: Registers,
        *,
        wanted: FeatureSet | None = None,
        required: FeatureSet | None = None,
        layout: ConfigLayout | None = None,
        queue_size: int | None = None,
        indirect: bool = False,
        policy: Policy = Policy.interop,
        arena: Arena | None = None,
        timeout: float = 10.0,
    ) -> None:
        self.registers = registers
        self.loop = registers.loop
        self.memory = registers.memory
        self.wanted = DRIVER_FEATURES if wanted is None else wanted
        self.required = FeatureSet() if required is None else required
        self.layout = ConfigLayout() if layout is None else layout
        self.queue_size = queue_size
        self.indirect = indirect
        self.policy = policy
        self.arena = Arena(self.memory) if arena is None else arena
        self.timeout = timeout
        self.features = self.wanted - self.wanted
        self.queues: dict[int, DriverQueue] = {}
        self._status = 0
        self._broken: Exception | None = None
        self._config_waiting = False
        self._suspended = False
        self._calls_waiting: set[int] = set()
        self._flying: dict[tuple[int, int], Request] = {}
        self._lost: list[Request] = []
        self._rings: dict[int, list[int]] = {}

    def __repr__(self) -> str:
        states = {"broken": self._broken is not None, "suspended": self._suspended, "live": self.live}
        state = next((name for name, holds in states.items() if holds), "down")
        return f"<{type(self).__name__} {state}, features {self.features}, {len(self._flying)} in flight>"

    # --- bring-up (3.1.1) -----------------------------------------------------------------------------------

    @property
    def live(self) -> bool:
        """Whether DRIVER_OK is set and the device is neither broken nor suspended."""
        return bool(self._status & Status.DRIVER_OK) and self._broken is None and not self._suspended

    @property
    def suspended(self) -> bool:
        """Whether the device is suspended, or was asked to be."""
        return self._suspended

    @property
    def broken(self) -> Exception | None:
        """Why the device cannot be used before the next `initialize`; None while it can."""
        return self._broken

    @property
    def in_flight(self) -> list[Request]:
        """The requests that the device has, oldest first."""
        return list(self._flying.values())

    def initialize(self) -> FeatureSet:
        """Reset the device and bring it up; what was in flight is lost.

        Returns:
            The negotiated features.

        Raises:
            StateError: there is no device (device id 0).
            StatusViolation: features that cannot be agreed upon, or a status that does not read back.
            DeviceNeedsReset, PeerTimeout: the device does not come up.
        """
        self.reset()
        if self.registers.device_id() == 0:
            raise StateError("the device id is 0: there is no device here")
        self.registers.listen(call=self._called, config_changed=self._config_interrupt)
        try:
            self._advance(Status.ACKNOWLEDGE)
            self._advance(Status.DRIVER)
            legacy = self.registers.legacy
            names = {**self.wanted.device, **self.required.device}
            offered = FeatureSet.from_bits(self.registers.device_features(), device=names)
            self.features = negotiate(
                offered,
                self.wanted,
                self.required,
                requires=self.requires,
                transport=self.registers.transport,
                legacy=legacy,
            )
            self.registers.write_driver_features(self.features.bits)
            if not legacy:
                self._advance(Status.FEATURES_OK)
            for index, size in enumerate(self.registers.queue_max_sizes()):
                if size:
                    self._set_up_queue(index, size)
            self.set_up()
            self._advance(Status.DRIVER_OK)
        except VirtioTestError:
            self._status |= Status.FAILED
            # What made us give up is what there is to say, not how the device takes it.
            with suppress(PeerError):
                self.registers.write_status(self._status)
            raise
        try:
            for queue in self.queues.values():
                queue.enable_calls()
                # What `set_up` put in is kicked only now: never before DRIVER_OK (3.1.1).
                queue.signal()
        except PeerError as error:
            self._break(error)
            raise
        self.started()
        self._catch_up()
        return self.features

    def _catch_up(self) -> None:
        """Deliver what was kept because the driver could not do anything with it."""
        calls, self._calls_waiting = self._calls_waiting, set()
        for index in sorted(calls):
            self._called(index)
        if self._config_waiting:
            self._config_waiting = False
            self._config_interrupt()

    def _advance(self, bit: Status) -> None:
        self._status |= bit
        self.registers.write_status(self._status)
        check_read_back(self._status, self.registers.read_status())

    def _set_up_queue(self, index: int, limit: int) -> None:
        layout = self._lay_out(index, limit)
        size = layout.size
        tables: int | None = None
        if self.indirect and "INDIRECT_DESC" in self.features:
            tables = self.arena.allocate(size * _INDIRECT_ENTRIES * 16)
            self._rings[index].append(tables)
        config = QueueConfig.from_layout(
            layout,
            index=index,
            features=self.features.bits & 0xFFFF_FFFF_FFFF_FFFF,
            policy=self.policy,
        )
        self.queues[index] = DriverQueue(
            self.memory,
            config,
            kick=self.registers.kick_notifier(index, lambda: self._position(index)),
            indirect=tables,
            indirect_entries=_INDIRECT_ENTRIES,
        )
        self.registers.enable_queue(config)

    def _lay_out(self, index: int, limit: int) -> RingLayout:
        """Room for a queue: what the interface in use prescribes, or as small as it can be."""
        if self.registers.legacy:
            room = RingLayout.legacy(limit, 0, align=_LEGACY_ALIGN).end
            ring = self.arena.allocate(room, align=_LEGACY_ALIGN)
            if ring == 0:
                # Page number 0 says that there is no queue.
                ring = self.arena.allocate(room, align=_LEGACY_ALIGN)
                self.arena.free(0)
            layout = RingLayout.legacy(limit, ring, align=_LEGACY_ALIGN)
        else:
            packed = "RING_PACKED" in self.features
            size = limit if self.queue_size is None else min(limit, self.queue_size)
            if not packed:
                size = 1 << size.bit_length() - 1
            ring = self.arena.allocate(RingLayout.contiguous(size, 0, packed=packed).end)
            layout = RingLayout.contiguous(size, ring, packed=packed)
        self._rings[index] = [ring]
        return layout

    def _position(self, index: int) -> int:
        queue = self.queues.get(index)
        return 0 if queue is None else queue.state.avail

    def reset(self) -> list[Request]:
        """Reset the device and wait, bounded, until it says that it has (2.4.2); what was in flight is lost.

        Returns:
            The requests that were in flight, oldest first, each finished with an error now.

        Raises:
            PeerTimeout: the status does not become 0; the device may still use the buffers, so none are freed.
        """
        try:
            self.registers.write_status(0)
            if self.registers.read_status() != 0:
                self._poll_until(lambda: self.registers.read_status() == 0, "the end of the reset")
        except PeerError as error:
            # Neither up nor down: nothing comes back any more, and nothing can be submitted.
            self._break(error)
            raise
        self._status = 0
        self._broken = None
        self._config_waiting = False
        self._suspended = False
        self._calls_waiting.clear()
        self.features = self.wanted - self.wanted
        lost = [request for index in list(self._rings) for request in self._drop_queue(index)]
        for request in self._lost:
            self._free(request)
        self._lost.clear()
        return lost

    def detach(self) -> list[Request]:
        """Leave the device for good: `reset`, and nobody listens any more."""
        lost = self.reset()
        self.registers.listen(call=lambda _: None, config_changed=lambda: None)
        return lost

    def reset_queue(self, index: int) -> list[Request]:
        """Reset one queue and enable it again (2.6.1); what was in flight in it is lost, and returned.

        Raises:
            NoFeature: RING_RESET was not negotiated.
            QueueViolation: `QueueGone` (2.6.1.1), the device has no such queue any more.
        """
        self._check_up(Status.DRIVER_OK)
        if "RING_RESET" not in self.features:
            raise NoFeature("one queue cannot be reset alone: RING_RESET was not negotiated")
        self._queue(index)
        self.registers.reset_queue(index)
        lost = self._drop_queue(index)
        size = dict(enumerate(self.registers.queue_max_sizes())).get(index, 0)
        if not size:
            # A queue that was reset is as it was after the device's reset, and then it was there.
            gone = QueueViolation("QueueGone", "2.6.1.1", "the queue is not available after its reset", queue=index)
            self._break(gone)
            raise gone
        self._set_up_queue(index, size)
        self.queues[index].enable_calls()
        return lost

    # --- suspended (3.4) ------------------------------------------------------------------------------------

    def suspend(self) -> None:
        """Suspend the device and wait, bounded, until it says that it is; what is in flight stays so.

        Raises:
            NoFeature: SUSPEND was not negotiated.
            StateError: the driver is not live, or this is inside the loop.
            DeviceNeedsReset, PeerTimeout, StatusViolation: it does not suspend; only `initialize` helps then.
        """
        self._check_up(Status.DRIVER_OK)
        if "SUSPEND" not in self.features:
            raise NoFeature("the device cannot be suspended: SUSPEND was not negotiated")
        self._move(Status.SUSPEND, Status.DRIVER_OK, "the suspension")

    def resume(self) -> None:
        """Let a suspended device go on and wait, bounded, until it does; what came back meanwhile is delivered.

        Raises:
            StateError: it is not suspended, or this is inside the loop.
            DeviceNeedsReset, PeerTimeout, StatusViolation: it does not go on; only `initialize` helps then.
        """
        if self._broken is None and not self._suspended:
            raise StateError("the device is not suspended")
        self._check_up(Status.FEATURES_OK, suspended=True)
        self._move(Status.DRIVER_OK, Status.SUSPEND, "the resume")
        self._suspended = False
        self._catch_up()

    def _move(self, appears: Status, vanishes: Status, what: str) -> None:
        """Set one of the two bits and wait until the device has taken the other away (3.4.1)."""
        if self.loop.running:
            raise StateError(f"{what} is waited for in the loop, and cannot be from inside it")
        then = self._status & ~vanishes | appears
        self._suspended = True
        try:
            self.registers.write_status(self._status | appears)
            self._poll_until(lambda: self._has_moved(then), what)
            check_read_back(then, self.registers.read_status())
        except PeerError as error:
            self._break(error)
            raise
        self._status = then

    def _has_moved(self, then: int) -> bool:
        read = self.registers.read_status()
        return bool(read & Status.DEVICE_NEEDS_RESET) or not (read ^ then) & (Status.SUSPEND | Status.DRIVER_OK)

    # --- what one queue has ---------------------------------------------------------------------------------

    def _drop_queue(self, index: int) -> list[Request]:
        """Take everything in flight back from a queue that the device does not have any more."""
        # There is none when the set-up of the queue has failed half way.
        queue = self.queues.pop(index, None)
        tokens = [] if queue is None else queue.detach()
        lost = [self._flying.pop((index, token)) for token in tokens if (index, token) in self._flying]
        for address in self._rings.pop(index):
            self.arena.free(address)
        for request in lost:
            self._free(request)
            request.finish(error=StateError("the driver reset the device, or its queue, before the answer"))
        return lost

    # --- requests -------------------------------------------------------------------------------------------

    def submit(
        self,
        queue_index: int,
        readable: Sequence[bytes],
        writable: Sequence[int] = (),
        *,
        indirect: bool | None = None,
        publish: bool = True,
        on_done: Callable[[Request], object] | None = None,
    ) -> Request:
        """Give one chain to the device: a buffer for each item of `readable`, one for each size in `writable`.

        Args:
            queue_index: the virtqueue.
            readable: what the device reads.
            writable: sizes in bytes of what it may write.
            indirect: use an indirect table; the driver's own choice when None.
            publish: make it visible and kick now; else `flush` does, for many at once.
            on_done: called with the request, once, when it is back or lost.

        Raises:
            StateError: the driver is not up (from `set_up` on it is), or its memory is used up.
            QueueFull: no descriptors are free.
            InvalidArgument: an empty buffer, or no buffer at all.
        """
        self._check_up(Status.DRIVER if self.registers.legacy else Status.FEATURES_OK)
        queue = self._queue(queue_index)
        if indirect is None:
            indirect = self.indirect and "INDIRECT_DESC" in self.features
        if len(readable) + len(writable) > queue.size:
            # Before any memory is looked for: how many there are may follow from what the device says of itself.
            count = len(readable) + len(writable)
            raise InvalidArgument(f"a chain of {count} buffers does not fit a queue of {queue.size}")
        request = Request(self, queue_index, [], [], on_done)
        try:
            for data in readable:
                address = self.arena.allocate(len(data))
                request.readable.append((address, len(data)))
                self.memory.write(address, data)
            for size in writable:
                request.writable.append((self.arena.allocate(size), size))
            request.token = queue.add(request.readable, request.writable, indirect=indirect)
        except VirtioTestError:
            self._free(request)
            raise
        self._flying[queue_index, request.token] = request
        if publish and self._status & Status.DRIVER_OK:
            queue.signal()
        return request

    def flush(self, queue_index: int) -> bool:
        """Make everything submitted visible and kick, if the device wants to be; whether it was kicked."""
        self._check_up(Status.DRIVER_OK)
        return self._queue(queue_index).signal()

    def run_until(self, condition: Callable[[], bool], what: str, *, timeout: float | None = None) -> None:
        """Run the loop until `condition` holds.

        Raises:
            PeerTimeout: it did not, within the bound; `what` names it.
            DeviceNeedsReset: it did not, and the device turns out to be broken.
        """
        bound = self.timeout if timeout is None else timeout
        if self.loop.run(until=condition, timeout=bound):
            return
        if self._status and not self._intact() and condition():
            return
        raise PeerTimeout(f"{what} did not come within {bound:g} s")

    def _poll_until(self, condition: Callable[[], bool], what: str) -> None:
        """`run_until` for a register: nothing wakes the loop when that changes."""
        poll = Timer(self.loop.clock, lambda: None, first_after=_POLL_SECONDS, every=_POLL_SECONDS)
        try:
            self.run_until(condition, what)
        finally:
            poll.stop()

    def _called(self, queue_index: int) -> None:
        queue = self.queues.get(queue_index)
        if queue is None or self._broken is not None:
            return
        if self._suspended:
            self._calls_waiting.add(queue_index)
            return
        try:
            queue.disable_calls()
            for _ in range(queue.size):
                if (used := queue.get_used()) is not None:
                    self._complete(queue_index, *used)
                    # What was told may have found the device broken: nothing is in flight then, and so it is with a
                    # queue that was reset, from which nothing more comes.
                    if self._broken is not None:
                        return
                elif not queue.enable_calls():
                    return
        except QueueViolation as error:
            self._break(error)
            return
        # A device that uses what comes back to it as fast as it comes would keep us here for ever.
        self.loop.pend((self, queue_index), lambda: self._called(queue_index))

    def _complete(self, queue_index: int, token: int, written: int) -> None:
        request = self._flying.pop((queue_index, token))
        data = b""
        left = written
        for address, length in request.writable:
            data += self.memory.read(address, min(left, length))
            left -= min(left, length)
        self._free(request)
        request.finish(written=written, data=data)

    def _free(self, request: Request) -> None:
        for address, _ in (*request.readable, *request.writable):
            self.arena.free(address)
        request.readable.clear()
        request.writable.clear()

    def _break(self, error: Exception) -> None:
        """The device is broken: finish everything in flight, but leave its memory alone until the reset."""
        if self._broken is not None:
            return
        self._broken = error
        lost = list(self._flying.values())
        self._lost += lost
        self._flying.clear()
        for request in lost:
            request.finish(error=error)

    def _check_up(self, bit: Status, *, suspended: bool = False) -> None:
        if self._broken is not None:
            raise self._broken.with_traceback(None)
        if self._suspended and not suspended:
            raise StateError("the device is suspended: resume() it")
        if not self._status & bit or self._status & Status.FAILED:
            raise StateError("the driver is not live: initialize() it")

    def _queue(self, index: int) -> DriverQueue:
        queue = self.queues.get(index)
        if queue is None:
            raise InvalidArgument(f"no queue {index}; queues: {sorted(self.queues)}")
        return queue

    # --- configuration space --------------------------------------------------------------------------------

    def read_config(self, offset: int, length: int) -> bytes:
        """Bytes of one generation: read again while the generation moves, as 2.5.3 has a driver do.

        Raises:
            StatusViolation: the generation never stands still, or the space is shorter.
        """
        self._check_space(offset, length)
        for _ in range(_CONFIG_TRIES):
            before = self.registers.config_generation()
            data = self.registers.read_config(offset, length)
            if self.registers.config_generation() == before:
                return data
        raise StatusViolation("ConfigNeverStable", "2.5", f"the generation moved in each of {_CONFIG_TRIES} reads")

    def read_field(self, name: str) -> int | bytes:
        """The value of a field of `layout`."""
        field = self.layout[name]
        return field.decode(self.read_config(field.offset, field.size))

    def write_field(self, name: str, value: int | bytes) -> None:
        """Write a field of `layout`.

        Raises:
            StateError: the device is suspended (3.4.1).
            StatusViolation: the space is shorter.
        """
        if self._suspended:
            raise StateError("the device is suspended, and its configuration space is not written: resume() it")
        field = self.layout[name]
        self._check_space(field.offset, field.size)
        self.registers.write_config(field.offset, field.encode(value))

    def _check_space(self, offset: int, length: int) -> None:
        if offset + length > self.registers.config_size():
            message = f"{length} bytes at offset {offset} of a space of {self.registers.config_size()}"
            raise StatusViolation("ConfigTooShort", "2.5", message)

    def _config_interrupt(self) -> None:
        if self._suspended or not self._status & Status.DRIVER_OK:
            self._config_waiting = True
        elif self._intact():
            try:
                self.config_changed()
            except PeerError as error:
                # It is this device that is broken, not whoever runs the loop.
                self._break(error)

    def _intact(self) -> bool:
        """Whether the device works and can be asked at all; if not, everything in flight is finished."""
        try:
            needs_reset = self.registers.read_status() & Status.DEVICE_NEEDS_RESET
        except PeerError as error:
            self._break(error)
            return False
        if needs_reset:
            self._break(DeviceNeedsReset("the device has set DEVICE_NEEDS_RESET"))
        return not needs_reset

    # --- what a subclass may extend -------------------------------------------------------------------------

    def set_up(self) -> None:
        """Called before DRIVER_OK, when features and queues stand: read the configuration, fill receive queues."""

    def started(self) -> None:
        """Called after DRIVER_OK."""

    def config_changed(self) -> None:
        """Called for each configuration change notification while the driver is live."""
