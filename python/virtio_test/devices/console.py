"""The console device (VIRTIO 1.4, 5.3): port 0 alone, or several ports with control queues.

Theory
------
**Output** goes to a callable or a descriptor of each port as the driver sends it. A descriptor that takes no more for
now loses what does not fit, counted in `dropped`: a reader that sleeps must not stop the device.

**Input** waits in the port, at most `max_input` bytes of it, until the driver has put in buffers; `feed` says how much
it took. A driver that asks for no input costs a bounded amount of memory and nothing else.

**Ports** (MULTIPORT; 5.3.6.2): the driver says DEVICE_READY, is told of each port, says PORT_READY for each, and learns
its name, whether it is a console and whether our side is open. Each of these is said once per reset, however often the
driver asks, so that what waits for its control buffers is bounded too. What it says wrongly is counted in `odd`.

The configuration field `emerg_wr` puts one character out at any time, with or without a driver (5.3.5.1).
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias, cast

from virtio_test._core import Chain, DeviceQueue
from virtio_test.config import ConfigLayout, ConfigSpace
from virtio_test.console import shown
from virtio_test.errors import InvalidArgument, QueueViolation, SavedStateError, StaleMemory
from virtio_test.features import FeatureSet
from virtio_test.spec.console import (
    CONFIG_FIELDS,
    CONTROL,
    CONTROL_RECEIVE_QUEUE,
    CONTROL_TRANSMIT_QUEUE,
    FEATURE_NAMES,
    MAX_PORTS,
    RESIZE,
    ControlEvent,
)
from virtio_test.spec.ids import DeviceId

from .base import BUDGET, OnHandlerError
from .chains import CHUNK, ChainDevice, DirectHandler

__all__ = ["CONFIG_LAYOUT", "ConsoleDevice", "ConsolePort"]

Output: TypeAlias = Callable[[bytes], object] | int

CONFIG_LAYOUT: Final = ConfigLayout(*CONFIG_FIELDS)

_QUEUE_SIZE: Final = 64
_MAX_INPUT: Final = 64 << 10
_MAX_NAME: Final = 255
_PIPE_BUF: Final = 4096
_KEY: Final = 6
"""Bytes of a control message that name the port and the event."""


def port_queues(number: int) -> tuple[int, int]:
    """The receive and the transmit queue of a port (5.3.2)."""
    first = 0 if number == 0 else 2 * number + 2
    return first, first + 1


@dataclass(slots=True)
class ConsolePort:
    """One port, as it is declared and as it stands.

    Attributes:
        output: takes what the driver sends: a callable, or a descriptor that is written to and stays open.
        name: what the driver is told; None tells nothing.
        console: whether it is announced as a console.
        open: whether our side is open; the driver is told.
        guest_open: whether the driver says that its side is.
        added: whether the driver was told that it exists.
        ready: whether the driver said that it is ready.
        waiting: input that no buffer has taken yet.
        dropped: bytes that a descriptor did not take.
    """

    output: Output
    name: str | None = None
    console: bool = True
    open: bool = True
    guest_open: bool = False
    added: bool = False
    ready: bool = False
    waiting: bytearray = field(default_factory=bytearray, repr=False)
    dropped: int = 0

    def put(self, data: bytes) -> None:
        """Put `data` out; a descriptor gets what it takes without waiting."""
        if callable(self.output):
            self.output(data)
            return
        # The description may be shared with others, so it stays blocking; a pipe that is ready takes this much.
        target, step = self.output, _PIPE_BUF
        if os.isatty(target):
            # One that is ready may have room for a single byte. A description of our own can be one that never waits.
            target = _reopened(target)
            step = 1 if target == self.output else _PIPE_BUF
        ready = select.poll()
        ready.register(target, select.POLLOUT)
        done = 0
        try:
            while done < len(data) and ready.poll(0)[:1] == [(target, select.POLLOUT)]:
                done += os.write(target, data[done : done + step])
        except OSError:
            # Whatever keeps it from taking more, the driver must not wait for it.
            pass
        finally:
            if target != self.output:
                os.close(target)
        self.dropped += len(data) - done


def _reopened(terminal: int) -> int:
    """Another description of a terminal, to be closed, that never waits; `terminal` itself where there is none."""
    path = f"/proc/self/fd/{terminal}"
    try:
        # The controlling end of a pseudoterminal would be opened as that of a new one.
        if str(Path(path).readlink()).endswith("ptmx"):
            return terminal
        return os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return terminal


class ConsoleDevice(ChainDevice):
    """The console device.

    Args:
        output: what port 0 puts out, when no `ports` are given.
        ports: the ports, from 0 on; offers MULTIPORT.
        size: columns and rows of port 0; None offers no SIZE.
        emergency: offer EMERG_WRITE.
        max_input: bytes of input that wait in one port at most.
        queue_size: largest size of each queue.
        device_id: virtio device id.
        transitional: serve a driver without VERSION_1 too.
        on_handler_error: what becomes of a buffer when an output raises; see `BaseDevice`.

    Attributes:
        ports: the ports, by number.
        odd: control messages that made no sense, and buffers of the wrong kind.

    Raises:
        InvalidArgument: neither or both of `output` and `ports`, too many ports, or a name longer than 255 bytes.
    """

    handler_errors: int

    def __init__(
        self,
        output: Output | None = None,
        *,
        ports: Sequence[ConsolePort] | None = None,
        size: tuple[int, int] | None = None,
        emergency: bool = True,
        max_input: int = _MAX_INPUT,
        queue_size: int = _QUEUE_SIZE,
        device_id: int = DeviceId.CONSOLE,
        transitional: bool = True,
        on_handler_error: OnHandlerError = "broken",
    ) -> None:
        if (output is None) == (ports is None):
            raise InvalidArgument("a console has either the output of its one port, or ports")
        made = list(ports) if ports is not None else [ConsolePort(cast("Output", output))]
        if not 1 <= len(made) <= MAX_PORTS:
            raise InvalidArgument(f"{len(made)} ports; 1 to {MAX_PORTS} are possible")
        if any(port.name is not None and len(port.name.encode()) > _MAX_NAME for port in made):
            raise InvalidArgument(f"a port's name is longer than {_MAX_NAME} bytes")
        multiport = ports is not None
        offered = [("SIZE", size is not None), ("MULTIPORT", multiport), ("EMERG_WRITE", emergency)]
        cols, rows = size or (0, 0)
        receive = {port_queues(number)[0]: port for number, port in enumerate(made)}
        chains: dict[int, DirectHandler] = {
            port_queues(number)[1]: partial(self._transmit, port) for number, port in enumerate(made)
        }
        if multiport:
            chains[CONTROL_TRANSMIT_QUEUE] = self._control
        count = port_queues(len(made) - 1)[1] + 1 if len(made) > 1 else 4 if multiport else 2
        super().__init__(
            device_id,
            chains=chains,
            queue_sizes=(queue_size,) * count,
            features=FeatureSet(*(name for name, offer in offered if offer), device=FEATURE_NAMES),
            config=ConfigSpace(CONFIG_LAYOUT, cols=cols, rows=rows, max_nr_ports=len(made) if multiport else 0),
            transitional=transitional,
            on_handler_error=on_handler_error,
        )
        self.config.on_driver_write = self._config_written
        self.ports: list[ConsolePort] = made
        self.max_input = max_input
        self.odd = 0
        self._receive = receive
        # By port and event, oldest first: what is said again replaces what still waits to be said.
        self._messages: dict[bytes, bytes] = {}

    # --- our side -------------------------------------------------------------------------------------------

    def feed(self, data: bytes, *, port: int = 0) -> int:
        """Input for a port, in the owner loop; how many bytes were taken, the rest is the caller's.

        Raises:
            InvalidArgument: there is no such port.
        """
        target = self._port(port)
        taken = data[: max(0, self.max_input - len(target.waiting))]
        target.waiting += taken
        self._pump(port_queues(port)[0])
        return len(taken)

    def resize(self, cols: int, rows: int, *, port: int = 0) -> None:
        """The console of a port has another size; port 0 shows it in the configuration space as well."""
        target = self._port(port)
        if port == 0:
            self.config.update(cols=cols, rows=rows)
        if target.ready and target.console:
            self._say(port, ControlEvent.RESIZE, more=RESIZE.pack(cols, rows))

    def set_open(self, *, on: bool, port: int = 0) -> None:
        """Our side of a port opens or closes; the driver is told."""
        target = self._port(port)
        if target.open != on:
            target.open = on
            if target.ready:
                self._say(port, ControlEvent.PORT_OPEN, on)

    def _port(self, number: int) -> ConsolePort:
        if not 0 <= number < len(self.ports):
            raise InvalidArgument(f"there is no port {number}; there are {len(self.ports)}")
        return self.ports[number]

    # --- what a transport calls -----------------------------------------------------------------------------

    def start_queue(self, queue: DeviceQueue) -> None:
        """See `Device.start_queue`."""
        super().start_queue(queue)
        # Until there is something to say, buffers that arrive need not be told of.
        if queue.index in self._receive or queue.index == CONTROL_RECEIVE_QUEUE:
            queue.disable_kicks()

    def kicked(self, queue_index: int) -> bool:
        """See `Device.kicked`."""
        if queue_index in self._chains:
            return super().kicked(queue_index)
        return self._pump(queue_index)

    def reset(self) -> None:
        """See `Device.reset`; input that nobody took is kept."""
        super().reset()
        self._messages.clear()
        for port in self.ports:
            port.added = port.ready = port.guest_open = False

    # --- to the driver --------------------------------------------------------------------------------------

    def _pump(self, index: int) -> bool:
        """Fill the buffers of a receive queue while there is something to fill them with; whether to come again."""
        queue = self._queues.get(index)
        # Whoever releases a device that is held kicks its queues.
        if queue is None or self._held:
            return False
        try:
            # No port: the control queue. Every other one is filled for a port, or is not filled at all.
            return self._pour(queue, self._receive.get(index))
        except QueueViolation as error:
            # Input comes at any time, so nobody stands around this.
            self.bus.broken(error)
            return False

    def _pour(self, queue: DeviceQueue, port: ConsolePort | None) -> bool:
        try:
            for _ in range(max(BUDGET, queue.size)):
                if not (self._messages if port is None else self._may_receive(port)):
                    queue.disable_kicks()
                    return False
                chain = queue.pop()
                if chain is None:
                    if not queue.enable_kicks():
                        return False
                    continue
                try:
                    used = self._fill_control(chain) if port is None else self._fill(chain, port)
                except StaleMemory:
                    used = 0
                except BaseException:
                    self._put_back(queue, chain)
                    raise
                queue.push(chain, used)
        finally:
            queue.signal()
        return True

    def _may_receive(self, port: ConsolePort) -> bool:
        """Whether input waits that the driver wants: with MULTIPORT only once its side is open."""
        return bool(port.waiting) and (port.guest_open or "MULTIPORT" not in self.negotiated)

    def _fill(self, chain: Chain, port: ConsolePort) -> int:
        if chain.readable or not chain.writable:
            self.odd += 1
        used = chain.write(port.waiting[: chain.writable])
        del port.waiting[:used]
        return used

    def _fill_control(self, chain: Chain) -> int:
        key, message = next(iter(self._messages.items()))
        if chain.writable < len(message):
            # Half a message says something else: the next buffer may be large enough.
            self.odd += 1
            return 0
        used = chain.write(message)
        del self._messages[key]
        return used

    def _say(self, number: int, event: ControlEvent, value: int = 0, *, more: bytes = b"") -> None:
        if "MULTIPORT" not in self.negotiated:
            return
        message = CONTROL.pack(number, event, value) + more
        self._messages.pop(message[:_KEY], None)
        self._messages[message[:_KEY]] = message
        self._pump(CONTROL_RECEIVE_QUEUE)

    # --- from the driver ------------------------------------------------------------------------------------

    def _transmit(self, port: ConsolePort, chain: Chain) -> int:
        if chain.writable or not chain.readable:
            self.odd += 1
        for done in range(0, chain.readable, CHUNK):
            port.put(chain.read(CHUNK, offset=done))
        return 0

    def _control(self, chain: Chain) -> int:
        message = chain.read(CONTROL.size)
        if "MULTIPORT" not in self.negotiated or len(message) < CONTROL.size:
            self.odd += 1
            return 0
        number, event, value = cast("tuple[int, int, int]", CONTROL.unpack(message))
        if event == ControlEvent.DEVICE_READY and value == 1:
            for each, port in enumerate(self.ports):
                if not port.added:
                    port.added = True
                    self._say(each, ControlEvent.DEVICE_ADD)
        elif number >= len(self.ports) or not self.ports[number].added:
            self.odd += 1
        elif event == ControlEvent.PORT_READY and value == 1:
            self._introduce(number)
        elif event == ControlEvent.PORT_OPEN and value <= 1:
            self.ports[number].guest_open = bool(value)
            self._pump(port_queues(number)[0])
        else:
            self.odd += 1
        return 0

    def _introduce(self, number: int) -> None:
        port = self.ports[number]
        if port.ready:
            return
        port.ready = True
        if port.console:
            self._say(number, ControlEvent.CONSOLE_PORT, 1)
        if port.name is not None:
            self._say(number, ControlEvent.PORT_NAME, 1, more=port.name.encode())
        if number == 0 and port.console and "SIZE" in self.negotiated:
            self._say(number, ControlEvent.RESIZE, more=RESIZE.pack(self.config.cols, self.config.rows))
        if port.open:
            self._say(number, ControlEvent.PORT_OPEN, 1)

    def _config_written(self, _: tuple[str, ...]) -> None:
        if "EMERG_WRITE" not in self.features:
            return
        try:
            self.ports[0].put(bytes((self.config.emerg_wr & 0xFF,)))
        except Exception:  # whatever the output raises, the access of the driver must be answered
            import logging

            self.handler_errors += 1
            logging.getLogger("virtio_test.device").exception("an emergency write could not be put out")

    # --- saved state ----------------------------------------------------------------------------------------

    def save(self) -> dict[str, object]:
        """The base's state, and of each port what the driver knows, what it said, and the input that waits."""
        ports = [
            {
                "open": port.open,
                "guest_open": port.guest_open,
                "added": port.added,
                "ready": port.ready,
                "waiting": bytes(port.waiting).hex(),
            }
            for port in self.ports
        ]
        return {**super().save(), "ports": ports, "messages": [each.hex() for each in self._messages.values()]}

    def check_state(self, state: Mapping[str, object]) -> None:
        """See `BaseDevice.check_state`."""
        super().check_state(state)
        saved = ConfigSpace(self.config.layout)
        saved.restore(state["config"])
        if saved.max_nr_ports != self.config.max_nr_ports:
            raise SavedStateError(f"the saved state has {saved.max_nr_ports} ports, this device {len(self.ports)}")
        self._checked(state)

    def apply_state(self, state: Mapping[str, object]) -> None:
        """See `BaseDevice.apply_state`."""
        super().apply_state(state)
        ports, messages = self._checked(state)
        for port, (flags, waiting) in zip(self.ports, ports, strict=True):
            port.open, port.guest_open, port.added, port.ready = flags
            port.waiting[:] = waiting
        self._messages = {each[:_KEY]: each for each in messages}

    def _checked(self, state: Mapping[str, object]) -> tuple[list[tuple[list[bool], bytes]], list[bytes]]:
        saved, messages = state["ports"], state["messages"]
        if not isinstance(saved, list) or not isinstance(messages, list):
            raise SavedStateError("the saved ports and messages are no lists")
        if len(cast("list[object]", saved)) != len(self.ports):
            raise SavedStateError(f"the saved state has not {len(self.ports)} ports")
        ports = [self._checked_port(each) for each in cast("list[object]", saved)]
        waiting = [_from_hex(each) for each in cast("list[object]", messages)]
        if any(not CONTROL.size <= len(each) <= CONTROL.size + _MAX_NAME for each in waiting):
            raise SavedStateError("a saved message is too short, or too long, for a control message")
        for number, event, _ in (cast("tuple[int, int, int]", CONTROL.unpack_from(each)) for each in waiting):
            if number >= len(self.ports) or event not in set(ControlEvent):
                raise SavedStateError(f"a saved message is about port {number} and event {event}, which are not there")
        if len({each[:_KEY] for each in waiting}) != len(waiting):
            raise SavedStateError("a saved message is there twice")
        return ports, waiting

    def _checked_port(self, saved: object) -> tuple[list[bool], bytes]:
        names = ("open", "guest_open", "added", "ready")
        port = cast("dict[str, object]", saved)
        if not isinstance(saved, dict) or set(port) != {*names, "waiting"}:
            raise SavedStateError(f"a saved port has the fields {', '.join(names)}, waiting")
        flags = [each for each in (port[name] for name in names) if isinstance(each, bool)]
        waiting = _from_hex(port["waiting"])
        if len(flags) != len(names) or len(waiting) > self.max_input:
            raise SavedStateError("a saved port's flags are no booleans, or more input waits than this device keeps")
        return flags, waiting


def _from_hex(text: object) -> bytes:
    try:
        return bytes.fromhex(cast("str", text))
    except (TypeError, ValueError):
        raise SavedStateError(f"{shown(text)} is no hexadecimal text") from None
