"""One client's connection to the server: its messages in order, and the device's accesses to memory it withholds.

Theory
------
An access to memory that the client has not shared is a command of ours (DMA_READ, DMA_WRITE) in the middle of
whatever the device does. It waits for the reply, and no longer than `patience`; the time of all accesses of one
turn is bounded as well. A client that lets us wait has broken its word: the access fails, as one to unmapped
memory does, and the connection ends.

What else comes during that wait keeps its order and is done afterwards, with exceptions without which QEMU and we
would wait for each other: it answers us under its big lock, and its processors hold that lock while they wait for
our reply.

* Commands that touch neither queues nor memory (`Session.is_prompt`) are served at once, if nothing waits before
  them: a guest that reads the ISR, or kicks another time.
* Any other write to a region is answered at once, and done later; so is the moving of memory, which QEMU has it
  wait for under that lock too, SeaBIOS' first request for one.
* What is left is a command that waits for its answer behind such a write. Then the access is given up after half
  the time, and fails; the connection lives on.

Accesses may come from any thread (a handler may complete a request from a thread of its own). Then the owner loop
reads the reply, as a rule. But it may be waiting for that very thread, which has the queue and the memory table
locked during the access; so a thread whose reply is not there soon reads for itself. What else it finds it leaves
to the owner loop, in its order: who reads, and says what becomes of it, has `_reading`.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final, TypeVar

from virtio_test.errors import MessageError, PeerDisconnected, PeerError, PeerTimeout, StateError
from virtio_test.transport.pci.interface import PciEndpoint

from .codec import Message, encode
from .messages import Command
from .payloads import MAX_DATA, DmaAccess, DmaData, DmaWritten, Payload
from .rules import violation
from .session import MOVES, Answer, Session, failed
from .wire import Wire

__all__ = ["Connection"]

_log: Final = logging.getLogger("virtio_test.vfio_user")
_PARTS_PER_TURN: Final = 64
"""Reads of one turn of the loop, so that a client that never stops talking starves nobody."""
_MAX_ABANDONED: Final = 100
_MAX_BACKLOG: Final = 256
_MAX_BACKLOG_BYTES: Final = 4 << 20
_SOON: Final = 0.01
"""Seconds after which a thread reads for itself."""
_T = TypeVar("_T")
_INSIDE: Final = MOVES | {Command.REGION_WRITE, Command.REGION_WRITE_MULTI}
"""What is answered inside of an access, and done after it."""


class _Waiter:
    """One command of ours and its reply."""

    __slots__ = ("command", "done", "message")

    def __init__(self, command: Command) -> None:
        self.command = command
        self.done = threading.Event()
        self.message: Message | None = None


class Connection:
    """Serves `endpoint` to the client at the other end of a socket.

    Args:
        connection: from now on this object's.
        endpoint: the PCI function.
        ended: called in a turn of its own when the connection turned out to be dead outside of `readable`.
        patience: seconds that the client may take to answer one access to its memory.

    Attributes:
        session: what the client has set up.
        error: why the connection must end, once that is known.
    """

    def __init__(
        self,
        connection: socket.socket,
        endpoint: PciEndpoint,
        *,
        ended: Callable[[], object],
        patience: float,
    ) -> None:
        self._wire = Wire(connection, "server")
        self._loop = endpoint.loop
        self._ended = ended
        self._patience = patience
        self._spent = 0.0
        self._lock = threading.Lock()
        self._reading = threading.RLock()
        self._waiting: dict[int, _Waiter] = {}
        self._number = 0
        self._thread = threading.get_ident()
        self._answering = False
        self._abandoned: set[int] = set()
        self._stuck = False
        self._backlog: deque[tuple[Message | Callable[[], None], int]] = deque()
        self._backlog_bytes = 0
        self._dead = False
        self.error: MessageError | None = None
        self.session = Session(endpoint, self)

    def __repr__(self) -> str:
        return f"<Connection {'dead' if self._dead else 'alive'}, {len(self._backlog)} waiting>"

    def fileno(self) -> int:
        """The socket's fd."""
        return self._wire.fileno()

    @property
    def dead(self) -> bool:
        """Whether it must end."""
        return self._dead

    # --- messages -------------------------------------------------------------------------------------------

    def readable(self) -> bool:
        """Read and serve what there is, within bounds; whether the client is still there.

        Raises:
            MessageError: the connection must end.
        """
        self._thread = threading.get_ident()
        for _ in range(_PARTS_PER_TURN):
            self._drain()
            if self._dead:
                return False
            with self._reading:
                # What another thread has read meanwhile comes first.
                messages = [] if self._backlog else self._wire.receive()
            if messages is None:
                return not self._wire.closed
            for message in messages:
                self._take(message)
        return True

    def _take(self, message: Message) -> None:
        if message.reply:
            self._replied(message)
        else:
            self._serve(message)

    def _serve(self, message: Message, *, inside: bool = False) -> None:
        answer = self._answer(message, inside=inside)
        if answer.then is not None:
            self._run(answer.then)

    def _answer(self, message: Message, *, inside: bool = False) -> Answer:
        before, self._answering = self._answering, True
        try:
            answer = self._run(lambda: self.session.handle(message, inside=inside))
        finally:
            self._answering = before
            # Before the answer: who has read it finds nothing of the message left.
            message.close()
        if answer.reply is not None:
            self._wire.send(answer.reply)
        return answer

    def _run(self, what: Callable[[], _T]) -> _T:
        try:
            return what()
        except MessageError:
            raise
        except Exception as error:
            # The device's own code, reached through a register or a reset.
            _log.exception("the device failed")
            raise failed(error) from error

    def _drain(self) -> None:
        """Do what came while the device waited for memory."""
        self._stuck = False
        while self._backlog and not self._dead:
            with self._reading:
                item, size = self._backlog.popleft()
                self._backlog_bytes -= size
            if isinstance(item, Message):
                self._serve(item)
            else:
                self._run(item)

    def _drain_soon(self) -> None:
        try:
            self._drain()
        except MessageError as error:
            self._die(error)

    # --- memory that the client withholds ---------------------------------------------------------------------

    def dma_read(self, address: int, count: int) -> bytes:
        """See `Port.dma_read`.

        Raises:
            PeerError: the client does not give it.
        """
        parts: list[bytes] = []
        while count > 0:
            step = min(count, self._transfer())
            reply = self._ask(Command.DMA_READ, DmaAccess(address, step))
            if not isinstance(reply, DmaData) or (reply.address, reply.count, len(reply.data)) != (
                address,
                step,
                step,
            ):
                raise self._broken(violation("ReplyData", f"{reply} answers a read of {step} at {address:#x}"))
            parts.append(reply.data)
            address, count = address + step, count - step
        return b"".join(parts)

    def dma_write(self, address: int, data: bytes) -> None:
        """See `Port.dma_write`.

        Raises:
            PeerError: the client does not take it.
        """
        at = 0
        while at < len(data):
            step = min(len(data) - at, self._transfer())
            reply = self._ask(Command.DMA_WRITE, DmaData(address + at, step, data[at : at + step]))
            if not isinstance(reply, DmaWritten) or (reply.address, reply.count) != (address + at, step):
                raise self._broken(violation("ReplyData", f"{reply} answers a write of {step} at {address + at:#x}"))
            at += step

    def _transfer(self) -> int:
        client = self.session.client
        return MAX_DATA if client is None else min(MAX_DATA, client.max_data_xfer_size)

    def _ask(self, command: Command, payload: Payload) -> Payload:
        """Send a command of ours and wait for its reply."""
        mine = threading.get_ident() == self._thread
        if self._dead:
            raise PeerDisconnected("the client has gone")
        if mine and (self._answering or self._stuck):
            raise StateError("the client waits for an answer and cannot serve its memory meanwhile")
        with self._lock:
            # Ids that are waited for are few; the next free one is near.
            self._number = (self._number + 1) & 0xFFFF
            while self._number in self._waiting or self._number in self._abandoned:
                self._number = (self._number + 1) & 0xFFFF
            number, waiter = self._number, _Waiter(command)
            self._waiting[number] = waiter
        try:
            self._wire.send(encode(command, number, payload))
            if mine:
                self._pump(waiter)
            else:
                self._wait(waiter)
        except MessageError as error:
            raise self._broken(error) from None
        finally:
            # Whoever reads the reply finds out in one look whether it is waited for, given up, or none of ours.
            with self._lock:
                self._waiting.pop(number, None)
                message = waiter.message
                given_up = message is None and mine and self._client_waits and len(self._abandoned) < _MAX_ABANDONED
                if given_up:
                    self._abandoned.add(number)
        if message is None:
            if self._dead or self._wire.closed:
                self._die(None)
                raise PeerDisconnected("the client has gone")
            if given_up:
                self._stuck = True
                raise PeerTimeout(f"{command.name} is given up: the client waits for us and does not serve it")
            raise self._broken(violation("ReplyLate", f"{command.name} was not answered in {self._patience:g} s"))
        if message.errno is not None:
            raise PeerError(f"the client refused {command.name}: errno {message.errno}")
        return message.payload

    def _pump(self, waiter: _Waiter) -> None:
        """In the owner loop: read until the reply is there, or for too long."""
        begin = time.monotonic()
        if not self._spent:
            self._loop.call_soon(self._new_turn)
        # However many accesses a request needs, the loop must turn again.
        end = begin + min(self._patience, max(0.0, 5 * self._patience - self._spent))
        while not waiter.done.is_set() and not self._wire.closed:
            left = (begin + self._patience / 2 if self._client_waits else end) - time.monotonic()
            if left <= 0 or not self._wire.wait(left):
                break
            with self._reading:
                for message in self._wire.receive() or ():
                    self._meanwhile(message)
        self._spent += max(1e-9, time.monotonic() - begin)

    @property
    def _client_waits(self) -> bool:
        """Whether a command that must be answered cannot be answered yet."""
        return any(isinstance(each, Message) and not each.no_reply for each, _ in list(self._backlog))

    def _wait(self, waiter: _Waiter) -> None:
        """In another thread: until the reply is there, or for too long."""
        end = time.monotonic() + self._patience
        while not self._dead and not self._wire.closed:
            left = end - time.monotonic()
            if waiter.done.wait(max(0.0, min(left, _SOON))) or left <= 0:
                return
            if self._reading.acquire(blocking=False):
                try:
                    while not waiter.done.is_set() and not self._dead and self._wire.wait(0):
                        for message in self._wire.receive() or ():
                            self._elsewhere(message)
                        if self._wire.closed:
                            return
                finally:
                    self._reading.release()

    def _elsewhere(self, message: Message) -> None:
        """A message that another thread than the owner's has read."""
        if message.reply:
            self._replied(message)
        else:
            self._postpone(message, message)

    def _new_turn(self) -> None:
        self._spent = 0.0

    def _meanwhile(self, message: Message) -> None:
        """A message that came while the device waits."""
        if message.reply:
            self._replied(message)
        elif self.session.is_prompt(message) and all(each == self.session.settle for each, _ in list(self._backlog)):
            # No register shows where memory lies, so it may go before what moves it.
            self._serve(message, inside=True)
        elif message.command in _INSIDE and not any(isinstance(each, Message) for each, _ in list(self._backlog)):
            answer = self._answer(message, inside=True)
            if answer.then is not None:
                self._postpone(answer.then, message)
        else:
            self._postpone(message, message)

    def _postpone(self, item: Message | Callable[[], None], message: Message) -> None:
        size = len(message.payload.pack())
        self._backlog_bytes += size
        if len(self._backlog) >= _MAX_BACKLOG or self._backlog_bytes > _MAX_BACKLOG_BYTES:
            raise violation("TooManyCommands", f"{len(self._backlog)} commands came while one of ours was unanswered")
        if not self._backlog:
            self._loop.call_soon(self._drain_soon)
        self._backlog.append((item, size))

    def _replied(self, message: Message) -> None:
        with self._lock:
            waiter = self._waiting.pop(message.id, None)
            if waiter is None and message.id in self._abandoned:
                self._abandoned.discard(message.id)
                return
            if waiter is None or waiter.command != message.command:
                raise violation(
                    "UnexpectedReply", f"a reply to {message.name} with id {message.id}, which was not sent"
                )
            waiter.message = message
        waiter.done.set()

    # --- the end ----------------------------------------------------------------------------------------------

    def _broken(self, error: MessageError) -> MessageError:
        self._die(error)
        return error

    def _die(self, error: MessageError | None) -> None:
        """From any thread: nothing more is asked of this client, and the connection ends in a turn of its own."""
        if not self._dead:
            self._dead = True
            self.error = error
            self._loop.call_soon(self._ended)

    def close(self) -> None:
        """The end of the connection: the function is as before, and nothing of the client's is left."""
        self._dead = True
        with self._lock:
            for waiter in self._waiting.values():
                waiter.done.set()
        with self._reading:
            for item, _ in self._backlog:
                if isinstance(item, Message):
                    item.close()
            self._backlog.clear()
        try:
            self.session.close()
        finally:
            with self._reading:
                self._wire.close()
