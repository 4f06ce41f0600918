"""`UmlPci`: a PCI function in front of user-mode Linux, carried by a virtio device ("PCI over virtio").

Theory
------
User-mode Linux has no PCI bus. Its kernel puts each access to configuration space or a BAR into a message, and sends
that through the command queue of a virtio device whose id it was configured for (1234, usually). Interrupts come
back in buffers of a second queue. So there are two devices, one inside the other:

* the **outer** one, `UmlPci`: a virtio device like any other, served over vhost-user;
* the **inner** one: whatever is behind the `PciEndpoint`.

User-mode Linux shares all of its memory with the outer device's back-end, and that is where the inner device's queues
are: the two have one memory object, and one loop.

**Commands.** A read is answered with as many bytes as it asks for; the driver waits for them in a busy loop, 40 ms or
so. Writes are posted. What cannot be (too short, unknown, outside of the function) is completed with 0 bytes and
noted in `errors`, and the first of its kind is logged as ``virtio_test.uml``; the driver has filled its answer with
ones before. Configuration space behind the function's own reads as ones, as on a bus. A transfer that is wider than a
register is made of aligned accesses of 4 bytes at most.

**Interrupts.** A message says what the function would write to memory, the line is a message whenever it rises. While
the driver has no buffer there, interrupts wait; equal ones are one, and of more than `MAX_WAITING` the oldest goes.

**Resets.** A reset of the outer device resets the function. While the command queue stands still the function is held.
If it then starts anew, and not from where it stood, there is a new driver, and the function is reset.
"""

from __future__ import annotations

import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Final

from virtio_test._core import Chain, DeviceQueue, GuestMemory, Policy
from virtio_test.device import Bus
from virtio_test.devices.base import BaseDevice, kept
from virtio_test.errors import InvalidArgument, MessageError, StateError
from virtio_test.loop import OwnerLoop
from virtio_test.spec.pcidev import COMMAND_QUEUE, HEADER, INTERRUPT_QUEUE, UML_PCI_DEVICE_ID, Op
from virtio_test.transport.pci.interface import PciEndpoint
from virtio_test.transport.vhost_user.backend import DEFAULT_PROTOCOL_FEATURES, Backend, serve
from virtio_test.transport.vhost_user.messages import ProtocolFeature

__all__ = ["MAX_ERRORS", "MAX_WAITING", "EndpointFactory", "UmlPci", "serve_uml"]

MAX_ERRORS: Final = 1000
"""Errors that are kept; all are counted. A driver can cause any number of them."""

MAX_WAITING: Final = 2048
"""Interrupts that wait for a buffer: as many as there can be MSI-X vectors."""

EndpointFactory = Callable[[OwnerLoop, GuestMemory], PciEndpoint]
"""Makes the function, over the loop and the memory that it shares with the outer device."""

_log: Final = logging.getLogger("virtio_test.uml")
_DOCUMENT: Final = "linux/virtio_pcidev.h"
_SPACE: Final = 4096
_WIDEST: Final = 4
_CONFIG_WIDTHS: Final = frozenset({1, 2, 4, 8})
_FRESH: Final = frozenset({0, 0x8000})
_QUEUE_SIZE: Final = 256
_CONFIG_OPS: Final = frozenset({Op.CFG_READ, Op.CFG_WRITE})
_READS: Final = frozenset({Op.CFG_READ, Op.MMIO_READ})
_ACCESS_WORK: Final = 512
"""One access to a register counts as that many bytes: a command of a few bytes can fill a whole BAR."""


class UmlPci(BaseDevice):
    """The device that carries `endpoint`.

    Args:
        endpoint: the function; its interrupts come here from now on.
        device_id: virtio id of the outer device.

    Attributes:
        endpoint: the function.
        errors: commands and buffers that could not be, the first thousand.
        ignored: how many of them there were, by rule.
        lost: interrupts that were dropped because too many different ones waited.
        commands: how many of each kind were carried out.
    """

    def __init__(self, endpoint: PciEndpoint, *, device_id: int = UML_PCI_DEVICE_ID) -> None:
        super().__init__(
            device_id,
            handlers={COMMAND_QUEUE: self._command, INTERRUPT_QUEUE: kept(self._buffer)},
            queue_sizes=(_QUEUE_SIZE, _QUEUE_SIZE),
            transitional=False,
        )
        self.endpoint = endpoint
        self.errors: list[MessageError] = []
        self.ignored: Counter[str] = Counter()
        self.commands: Counter[Op] = Counter()
        self.lost = 0
        self._buffers: deque[Chain] = deque()
        # As a dict for its order: an interrupt that waits already waits once.
        self._waiting: dict[bytes, None] = {}
        self._carried = False
        endpoint.connect(_Sink(self._interrupt))

    def __repr__(self) -> str:
        return f"<UmlPci id {self.device_id} of {self.endpoint!r}>"

    # --- what a transport calls -----------------------------------------------------------------------------

    def attach(self, bus: Bus) -> None:
        """See `Device.attach`.

        Raises:
            StateError: the bus and the function do not share one memory.
        """
        if bus.memory is not self.endpoint.memory:
            raise StateError("user-mode Linux has one memory: make the function over the memory of the outer device")
        super().attach(bus)

    def start_queue(self, queue: DeviceQueue) -> None:
        """See `Device.start_queue`."""
        super().start_queue(queue)
        if queue.index == COMMAND_QUEUE:
            if self._carried and queue.state.avail in _FRESH:
                self._reset_function()
            self._carried = True
            self.endpoint.release()

    def stop_queue(self, queue_index: int) -> None:
        """See `Device.stop_queue`."""
        if queue_index == COMMAND_QUEUE:
            self.endpoint.hold()
        else:
            self._buffers.clear()
        super().stop_queue(queue_index)

    def reset(self) -> None:
        """See `Device.reset`."""
        super().reset()
        self._buffers.clear()
        self._reset_function()
        self.endpoint.release()
        self._carried = False

    def save(self) -> dict[str, object]:
        """See `Device.save`.

        Raises:
            StateError: always: a PCI function behind user-mode Linux has no saved state.
        """
        raise StateError("a PCI function behind user-mode Linux cannot be saved")

    def _reset_function(self) -> None:
        self.endpoint.reset()
        self._waiting.clear()

    # --- commands -------------------------------------------------------------------------------------------

    def _command(self, request: bytes) -> bytes | None:
        try:
            return self._carry_out(request)
        except MessageError as error:
            self._note(error)
            return None

    def _carry_out(self, request: bytes) -> bytes | None:
        if len(request) < HEADER.size:
            raise _error("CommandShort", f"a command of {len(request)} bytes, its header has {HEADER.size}")
        code, bar, _, size, address = HEADER.unpack_from(request)
        if not Op.CFG_READ <= code <= Op.MMIO_MEMSET:
            raise _error("UnknownCommand", f"op {code} is no command")
        op = Op(code)
        data = request[HEADER.size :]
        config = op in _CONFIG_OPS
        if config and size not in _CONFIG_WIDTHS:
            raise _error("CommandSize", f"{op.name} of {size} bytes, configuration accesses have 1, 2, 4 or 8")
        sizes = {each.index: each.size for each in self.endpoint.bars}
        if not config and bar not in sizes:
            raise _error("NoSuchBar", f"{op.name} of BAR {bar}; there are {sorted(sizes)}")
        limit = _SPACE if config else sizes[bar]
        if not 0 < size <= limit - min(address, limit):
            where = "configuration space" if config else f"BAR {bar}"
            raise _error("CommandRange", f"{op.name} of {size} bytes at {address:#x}; {where} has {limit}")
        if op in _READS:
            self.commands[op] += 1
            return self._read(None if config else bar, address, size)
        wanted = 1 if op is Op.MMIO_MEMSET else size
        if len(data) < wanted:
            raise _error("CommandData", f"{op.name} of {size} bytes with {len(data)} bytes of data")
        self.commands[op] += 1
        self._write(None if config else bar, address, data[:1] * size if op is Op.MMIO_MEMSET else data[:size])
        return None

    def _read(self, bar: int | None, address: int, size: int) -> bytes:
        if bar is not None:
            accesses = [*_accesses(address, size)]
            self.charge(_ACCESS_WORK * len(accesses))
            return b"".join(self.endpoint.read_bar(bar, at, width) for at, width in accesses)
        inside = max(0, min(size, self.endpoint.config_size - address))
        return (self.endpoint.read_config(address, inside) if inside else b"").ljust(size, b"\xff")

    def _write(self, bar: int | None, address: int, data: bytes) -> None:
        if bar is not None:
            accesses = [*_accesses(address, len(data))]
            self.charge(_ACCESS_WORK * len(accesses))
            for at, width in accesses:
                self.endpoint.write_bar(bar, at, data[at - address : at - address + width])
        elif (inside := min(len(data), self.endpoint.config_size - address)) > 0:
            self.endpoint.write_config(address, data[:inside])

    def kicked(self, queue_index: int) -> bool:
        """See `Device.kicked`; notes the answers that found no room."""
        queue = self._queues.get(queue_index)
        before = queue.counters.rejected if queue is not None else 0
        more = super().kicked(queue_index)
        for _ in range(queue.counters.rejected - before if queue is not None else 0):
            self._note(_error("CommandRoom", "a read with less room than the bytes that it asks for"))
        return more

    def _note(self, error: MessageError) -> None:
        self.ignored[error.rule] += 1
        if self.ignored[error.rule] == 1:
            _log.warning("the kernel's driver: %s; more of it is only counted", error)
        if len(self.errors) < MAX_ERRORS:
            self.errors.append(error)

    # --- interrupts -----------------------------------------------------------------------------------------

    def _interrupt(self, message: bytes) -> None:
        self._waiting[message] = None
        if len(self._waiting) > MAX_WAITING:
            del self._waiting[next(iter(self._waiting))]
            self.lost += 1
        self._deliver()

    def _buffer(self, chain: Chain) -> None:
        self._buffers.append(chain)
        self._deliver()

    def _deliver(self) -> None:
        while self._buffers and self._waiting:
            chain = self._buffers.popleft()
            message = next(iter(self._waiting))
            if chain.writable < len(message):
                self._note(_error("InterruptRoom", f"a buffer of {chain.writable} bytes for {len(message)}"))
                self.complete(chain)
            elif self.complete(chain, message):
                del self._waiting[message]


class _Sink:
    """The function's interrupts as messages."""

    def __init__(self, send: Callable[[bytes], object]) -> None:
        self._send = send

    def message(self, vector: int, address: int, data: int) -> None:  # noqa: ARG002 - who reads it goes by the data
        """See `InterruptSink.message`."""
        self._send(HEADER.pack(Op.MSI, 0, 0, 4, address) + data.to_bytes(4, "little"))

    def line(self, asserted: bool) -> None:  # noqa: FBT001 - `InterruptSink.line` has it so
        """See `InterruptSink.line`; only that it rises can be said, and INTA# is pin 1."""
        if asserted:
            self._send(HEADER.pack(Op.INT, 0, 0, 0, 1))


def _error(rule: str, message: str) -> MessageError:
    return MessageError(rule, _DOCUMENT, message)


def _accesses(address: int, size: int) -> Iterator[tuple[int, int]]:
    """Place and width of the accesses that a transfer is made of."""
    if size in (1, 2, 4, 8) and address % size == 0:
        yield address, size
        return
    end = address + size
    while address < end:
        width = next(each for each in (_WIDEST, 2, 1) if address % each == 0 and address + each <= end)
        yield address, width
        address += width


def serve_uml(
    make: EndpointFactory,
    path: str | os.PathLike[str] | None = None,
    *,
    fd: int | None = None,
    device_id: int = UML_PCI_DEVICE_ID,
    loop: OwnerLoop | None = None,
    protocol_features: ProtocolFeature = DEFAULT_PROTOCOL_FEATURES,
    policy: Policy = Policy.interop,
    ready: Callable[[Backend], object] | None = None,
) -> None:
    """Serve a PCI function to user-mode Linux until SIGINT or SIGTERM, or until the connection that `fd` is has ended.

    To be called in the main thread, as `transport.vhost_user.backend.serve`.

    Args:
        make: makes the function, over the loop and the memory that it is given. User-mode Linux has no I/O ports:
            a function's I/O BARs stay without an address there, so its legacy interface is never used.
        path: listen here; or
        fd: a UNIX stream socket that the launcher gave.
        device_id: virtio id that the kernel was configured for (CONFIG_UML_PCI_OVER_VIRTIO_DEVICE_ID).
        loop: the owner loop; one on the monotonic clock when None.
        protocol_features: protocol features that are offered.
        policy: tolerances towards the rings of the two outer queues.
        ready: called once front-ends can connect; the backend's device is the `UmlPci`.

    Raises:
        InvalidArgument: see `Backend`; or `make` did not use what it was given.
    """
    owner = OwnerLoop() if loop is None else loop
    memory = GuestMemory()
    endpoint = make(owner, memory)
    if endpoint.memory is not memory or endpoint.loop is not owner:
        raise InvalidArgument("the function must be made over the loop and the memory that are given")
    serve(
        UmlPci(endpoint, device_id=device_id),
        path,
        fd=fd,
        loop=owner,
        protocol_features=protocol_features,
        policy=policy,
        memory=memory,
        ready=ready,
    )
