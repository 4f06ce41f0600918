"""The driver of a console device (VIRTIO 1.4, 5.3), with one port or with many.

Theory
------
Receive buffers are kept in the ring of every port, as many as `buffers` says, and put back as soon as their bytes have
been taken over. What has arrived and nobody has read is bounded by `max_received` for each port: beyond that, buffers
stay out of the ring until `receive` makes room, and the device has to wait.

With MULTIPORT the driver says DEVICE_READY once it is live, answers each DEVICE_ADD with PORT_READY, and opens each
port that is named a console (5.3.6.2.2). Other ports are opened by `set_open`.

A control message that breaks a rule is kept in `findings`, the first `MAX_FINDINGS` of them, and has no effect. The NUL
that QEMU puts behind a port's name is none.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

from virtio_test._core import Policy
from virtio_test.config import ConfigLayout
from virtio_test.errors import AnswerViolation, InvalidArgument, NoFeature, QueueFull, StateError
from virtio_test.features import FeatureSet
from virtio_test.spec.console import (
    CONFIG_FIELDS,
    CONTROL,
    CONTROL_RECEIVE_QUEUE,
    CONTROL_TRANSMIT_QUEUE,
    FEATURE_NAMES,
    RESIZE,
    ControlEvent,
)

from .alloc import Arena
from .base import DRIVER_FEATURES, Driver
from .registers import Registers
from .request import Request

__all__ = ["MAX_FINDINGS", "ConsoleDriver", "PortState"]

MAX_FINDINGS: Final = 1000

_WANTED: Final = FeatureSet(*FEATURE_NAMES, device=FEATURE_NAMES)
_MULTIPORT: Final = FeatureSet("MULTIPORT", device=FEATURE_NAMES)
_CONTROL_BUFFERS: Final = 32
_CONTROL_SIZE: Final = 512
_MAX_OWED: Final = 1024


@dataclass(slots=True)
class PortState:
    """One port, as the device has described it.

    Attributes:
        number: the port.
        name: its name, once the device has told it.
        console: whether it is a console.
        open: whether the device's side is open.
        size: columns and rows that a RESIZE message gave; None before one came.
        received: bytes that nobody has read yet.
        offered: buffers in its receive queue.
    """

    number: int
    name: str | None = None
    console: bool = False
    open: bool = False
    size: tuple[int, int] | None = None
    received: bytearray = field(default_factory=bytearray, repr=False)
    offered: int = 0


class ConsoleDriver(Driver):
    """The driver of a console device.

    Args:
        registers: the device as the transport shows it.
        multiport: accept MULTIPORT.
        buffers: receive buffers of each port.
        buffer_size: bytes of each.
        max_received: bytes of a port that wait to be read, beyond which no buffer is put back.
        wanted: features of the ring to accept; those that the core can do, when None.
        queue_size: largest size of a queue.
        indirect: put every chain into an indirect table.
        policy: tolerances towards the device's used rings.
        arena: where rings and buffers lie.
        timeout: seconds of the loop's clock that waits take at most.

    Attributes:
        ports: the ports that exist, by number.
        findings: rules that the device broke in control messages.
    """

    def __init__(
        self,
        registers: Registers,
        *,
        multiport: bool = True,
        buffers: int = 8,
        buffer_size: int = 1024,
        max_received: int = 1 << 20,
        wanted: FeatureSet | None = None,
        queue_size: int | None = None,
        indirect: bool = False,
        policy: Policy = Policy.interop,
        arena: Arena | None = None,
        timeout: float = 10.0,
    ) -> None:
        if buffers < 1 or buffer_size < 1 or max_received < 1:
            raise InvalidArgument(f"{buffers} buffers of {buffer_size} bytes, {max_received} to wait: at least 1 each")
        features = _WANTED if multiport else _WANTED - _MULTIPORT
        super().__init__(
            registers,
            wanted=features | (DRIVER_FEATURES if wanted is None else wanted),
            layout=ConfigLayout(*CONFIG_FIELDS),
            queue_size=queue_size,
            indirect=indirect,
            policy=policy,
            arena=arena,
            timeout=timeout,
        )
        self.buffers = buffers
        self.buffer_size = buffer_size
        self.max_received = max_received
        self.ports: dict[int, PortState] = {}
        self.findings: list[AnswerViolation] = []
        self._max_ports = 1
        self._owed: deque[bytes] = deque()
        # Ports that were removed: their buffers stay in the ring, and are the next port's of that number.
        self._gone: dict[int, PortState] = {}

    # --- what a console is for ------------------------------------------------------------------------------

    def submit_send(self, data: bytes, *, port: int = 0) -> Request:
        """Send `data` and go on.

        Raises:
            QueueFull: no descriptors are free.
            InvalidArgument: there is no such port, or nothing to send.
        """
        return self.submit(self._queues_of(self._port(port).number)[1], [data])

    def send(self, data: bytes, *, port: int = 0, timeout: float | None = None) -> None:
        """Send `data` and wait until the device has taken it.

        Raises:
            PeerTimeout: it did not.
            InvalidArgument: there is no such port, or nothing to send.
        """
        self.submit_send(data, port=port).wait(timeout=timeout)

    def receive(self, count: int | None = None, *, port: int = 0, timeout: float | None = None) -> bytes:
        """At least one byte, at most `count` (all that came, when None), after waiting for it if need be.

        Raises:
            PeerTimeout: nothing came.
            InvalidArgument: there is no such port.
        """
        state = self._port(port)
        if not state.received:
            self.run_until(lambda: bool(state.received), f"input of port {port}", timeout=timeout)
        data = bytes(state.received if count is None else state.received[:count])
        del state.received[: len(data)]
        if self.live and self.ports.get(port) is state:
            self._offer(state)
        return data

    @property
    def size(self) -> tuple[int, int] | None:
        """Columns and rows of port 0, if the device tells them (SIZE)."""
        if "SIZE" not in self.features:
            return None
        cols, rows = self.read_field("cols"), self.read_field("rows")
        assert isinstance(cols, int)
        assert isinstance(rows, int)
        return cols, rows

    def emergency_write(self, character: int) -> None:
        """Put out one character without any queue, in any state of the device (5.3.5.1).

        Raises:
            NoFeature: the device does not offer EMERG_WRITE.
        """
        offered = FeatureSet.from_bits(self.registers.device_features(), device=FEATURE_NAMES)
        if "EMERG_WRITE" not in offered:
            raise NoFeature("the device does not offer EMERG_WRITE")
        self.write_field("emerg_wr", character)

    def set_open(self, *, on: bool, port: int = 0) -> None:
        """Our side of a port opens or closes.

        Raises:
            NoFeature: MULTIPORT was not negotiated.
        """
        if "MULTIPORT" not in self.features:
            raise NoFeature("ports are opened and closed with MULTIPORT, which was not negotiated")
        self._say(self._port(port).number, ControlEvent.PORT_OPEN, on)

    def _port(self, number: int) -> PortState:
        if number not in self.ports:
            raise InvalidArgument(f"there is no port {number}; ports: {sorted(self.ports)}")
        return self.ports[number]

    @staticmethod
    def _queues_of(port: int) -> tuple[int, int]:
        first = 0 if port == 0 else 2 * port + 2
        return first, first + 1

    # --- bring-up -------------------------------------------------------------------------------------------

    def set_up(self) -> None:
        """See `Driver.set_up`."""
        self.ports.clear()
        self._gone.clear()
        self.findings.clear()
        self._owed.clear()
        self._max_ports = 1
        if "MULTIPORT" not in self.features:
            self._add_port(0)
            return
        shown = self.read_field("max_nr_ports")
        assert isinstance(shown, int)
        self._max_ports = shown
        for _ in range(_CONTROL_BUFFERS):
            if not self._offer_control():
                break

    def started(self) -> None:
        """See `Driver.started`."""
        if "MULTIPORT" in self.features:
            self._say(0, ControlEvent.DEVICE_READY, 1)

    def _add_port(self, number: int) -> bool:
        """Take a port on and fill its receive queue; False when the device has no queues for it."""
        if any(each not in self.queues for each in self._queues_of(number)):
            return False
        before = self._gone.pop(number, None)
        self.ports[number] = PortState(number, offered=0 if before is None else before.offered)
        self._offer(self.ports[number])
        return True

    # --- receive queues -------------------------------------------------------------------------------------

    def _offer(self, port: PortState) -> None:
        """Put buffers into the port's queue, as long as what they may bring has room."""
        number = port.number
        index = self._queues_of(number)[0]
        while port.offered < self.buffers and len(port.received) < self.max_received:
            try:
                self.submit(index, [], [self.buffer_size], on_done=lambda request: self._received(number, request))
            except (QueueFull, StateError):
                return  # what is in the ring has to do
            port.offered += 1

    def _received(self, number: int, request: Request) -> None:
        port = self.ports.get(number)
        state = self._gone.get(number) if port is None else port
        if state is not None:
            state.offered -= 1
        if port is None or request.error is not None:
            return
        port.received += request.data
        self._offer(port)

    def _offer_control(self) -> bool:
        try:
            self.submit(CONTROL_RECEIVE_QUEUE, [], [_CONTROL_SIZE], on_done=self._control_received)
        except (QueueFull, StateError):
            return False
        return True

    def _control_received(self, request: Request) -> None:
        if request.error is not None:
            return
        self._heard(request.data)
        self._offer_control()

    # --- control messages -----------------------------------------------------------------------------------

    def _heard(self, message: bytes) -> None:
        if len(message) < CONTROL.size:
            self._find(
                "ControlTooShort", "5.3.6.2", f"a control message of {len(message)} bytes, {CONTROL.size} at least"
            )
            return
        number, event, value = CONTROL.unpack_from(message)
        if event == ControlEvent.DEVICE_ADD:
            self._added(number)
            return
        port = self.ports.get(number)
        if port is None:
            self._find("UnknownPort", "5.3.6.2.1", f"event {event} for port {number}, ports: {sorted(self.ports)}")
        elif event == ControlEvent.DEVICE_REMOVE:
            self._gone[number] = PortState(number, offered=self.ports.pop(number).offered)
        elif event == ControlEvent.CONSOLE_PORT:
            port.console = True
            self._say(number, ControlEvent.PORT_OPEN, 1)
        elif event == ControlEvent.PORT_OPEN:
            port.open = bool(value)
        elif event == ControlEvent.PORT_NAME:
            port.name = message[CONTROL.size :].split(b"\0", 1)[0].decode("utf-8", "backslashreplace")
        elif event == ControlEvent.RESIZE and len(message) >= CONTROL.size + RESIZE.size:
            port.size = RESIZE.unpack_from(message, CONTROL.size)
        else:
            self._find("UnknownEvent", "5.3.6.2", f"event {event} in a message of {len(message)} bytes")

    def _added(self, number: int) -> None:
        if number in self.ports:
            self._find("PortExists", "5.3.6.2.1", f"port {number} is added, and exists")
        elif number >= self._max_ports:
            self._find("PortBeyondMaximum", "5.3.6.2.1", f"port {number} is added, max_nr_ports is {self._max_ports}")
        else:
            self._say(number, ControlEvent.PORT_READY, self._add_port(number))

    def _say(self, port: int, event: ControlEvent, value: int) -> None:
        if len(self._owed) < _MAX_OWED:
            self._owed.append(CONTROL.pack(port, event, value))
        self._send_owed()

    def _send_owed(self) -> None:
        while self._owed:
            try:
                self.submit(CONTROL_TRANSMIT_QUEUE, [self._owed[0]], on_done=self._said)
            except (QueueFull, StateError):
                return  # the next message that the device takes makes room
            self._owed.popleft()

    def _said(self, request: Request) -> None:
        if request.error is None:
            self._send_owed()

    def _find(self, rule: str, clause: str, message: str) -> None:
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(AnswerViolation(rule, clause, message, queue=CONTROL_RECEIVE_QUEUE))
