"""`Qtest`: QEMU's own protocol for tests, over a stream socket.

Theory
------
One command is one line, and one line answers it: ``OK`` with values, ``FAIL`` or ``ERR`` with a reason. In between
QEMU says on its own when an intercepted interrupt line changes (``IRQ raise 16``). All bytes come from another
process, so nothing is read without a bound: an answer has a time limit however much else is said before it, a line
a length limit, and a number must be one. After a line that is none of the protocol nobody knows which answer belongs
to which command, so that is the end. Whoever made the object decides where lines go, and that must not be back into a
command: `on_irq` only takes note.
"""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Callable
from typing import Final

from virtio_test.errors import PeerDisconnected, PeerError, PeerTimeout, StateError

__all__ = ["Qtest"]

_MAX_LINE: Final = 1 << 20
_IRQ: Final = re.compile(r"IRQ (raise|lower) (\d{1,4})")
_WIDTHS: Final = {1: "b", 2: "w", 4: "l", 8: "q"}


class Qtest:
    """A client of one QEMU.

    Args:
        channel: a connected stream socket; this object closes it.
        timeout: real seconds that an answer takes at most.
        on_irq: called with (line, raised) for each change of an intercepted line, from inside of any method.
        last_words: what to add when QEMU is gone: what it said on its standard error.

    Attributes:
        timeout: as above; it may be changed between two commands.
    """

    def __init__(
        self,
        channel: socket.socket,
        *,
        timeout: float = 10.0,
        on_irq: Callable[[int, bool], object] = lambda _line, _raised: None,
        last_words: Callable[[], str] = lambda: "",
    ) -> None:
        self._channel = channel
        self._channel.settimeout(timeout)
        self.timeout = timeout
        self._on_irq = on_irq
        self._last_words = last_words
        self._buffer = b""
        self._gone: str | None = None

    def __repr__(self) -> str:
        return f"<Qtest {'gone' if self._gone is not None else 'connected'}>"

    def fileno(self) -> int:
        """The socket, for a loop that waits for interrupts; -1 once closed."""
        return self._channel.fileno()

    def close(self) -> None:
        """Close the socket; harmless when it is closed."""
        self._gone = self._gone or "it was closed"
        self._channel.close()

    # --- lines ----------------------------------------------------------------------------------------------

    def command(self, line: str) -> list[str]:
        """Send one command and wait for its answer: the words after ``OK``.

        Raises:
            StateError: QEMU refuses the command.
            PeerDisconnected: QEMU is gone.
            PeerTimeout: no answer in time; the connection is of no use afterwards.
            PeerError: an answer that is none.
        """
        self._check()
        end = time.monotonic() + self.timeout
        try:
            self._channel.settimeout(self.timeout)
            self._channel.sendall(line.encode() + b"\n")
        except TimeoutError:
            raise self._late(line) from None
        except OSError as error:
            raise self._dead(str(error)) from None
        while True:
            answer = self._line(line, end)
            words = answer.split()
            if words and words[0] in ("OK", "FAIL", "ERR"):
                break
            self._event(answer)
        # What came along with the answer would otherwise wait here for the next command: the socket has no more.
        self._take_lines()
        if words[0] != "OK":
            raise StateError(f"QEMU refuses {line!r}: {answer}")
        return words[1:]

    def take_events(self) -> None:
        """Take what QEMU has said on its own, without waiting.

        Raises:
            PeerDisconnected: QEMU is gone.
            PeerError: a line that is no event.
        """
        self._check()
        self._channel.setblocking(False)  # noqa: FBT003 - the socket's own interface
        try:
            with contextlib.suppress(BlockingIOError):
                self._receive()
        finally:
            self._channel.settimeout(self.timeout)
        self._take_lines()

    def _take_lines(self) -> None:
        while b"\n" in self._buffer:
            self._event(self._cut())

    def _line(self, line: str, end: float) -> str:
        while b"\n" not in self._buffer:
            left = end - time.monotonic()
            if left <= 0:
                raise self._late(line)
            try:
                self._channel.settimeout(left)
                self._receive()
            except TimeoutError:
                raise self._late(line) from None
        return self._cut()

    def _cut(self) -> str:
        first, _, self._buffer = self._buffer.partition(b"\n")
        return first.decode("ascii", "replace").strip()

    def _receive(self) -> None:
        try:
            data = self._channel.recv(65536)
        except (TimeoutError, BlockingIOError):
            raise
        except OSError as error:
            raise self._dead(str(error)) from None
        if not data:
            raise self._dead("it closed the connection")
        self._buffer += data
        if len(self._buffer) > _MAX_LINE:
            self._gone = "it sent a line without end"
            raise PeerError(f"QEMU sent more than {_MAX_LINE} bytes without an answer")

    def _event(self, line: str) -> None:
        found = _IRQ.fullmatch(line)
        if found is None:
            self._gone = "it said what is none of its test protocol"
            raise PeerError(f"QEMU said {line[:200]!r}, which is no answer and no event of its test protocol")
        self._on_irq(int(found[2]), found[1] == "raise")

    def _check(self) -> None:
        if self._gone is not None:
            raise PeerDisconnected(self._text())

    def _dead(self, why: str) -> PeerDisconnected:
        self._gone = why
        return PeerDisconnected(self._text())

    def _late(self, line: str) -> PeerTimeout:
        self._gone = f"it did not answer {line!r}"
        return PeerTimeout(f"QEMU did not answer {line!r} within {self.timeout:g} s")

    def _text(self) -> str:
        words = self._last_words()
        return f"QEMU is gone ({self._gone})" + (f"; its last words: {words}" if words else "")

    # --- accesses -------------------------------------------------------------------------------------------

    def read_memory(self, address: int, size: int) -> int:
        """Read 1, 2, 4 or 8 bytes at a physical address, as the processor would."""
        return self._number(f"read{_WIDTHS[size]} {address:#x}", size)

    def write_memory(self, address: int, size: int, value: int) -> None:
        """Write 1, 2, 4 or 8 bytes at a physical address."""
        self.command(f"write{_WIDTHS[size]} {address:#x} {value:#x}")

    def read_port(self, port: int, size: int) -> int:
        """Read 1, 2 or 4 bytes from an I/O port."""
        return self._number(f"in{_WIDTHS[size]} {port:#x}", size)

    def write_port(self, port: int, size: int, value: int) -> None:
        """Write 1, 2 or 4 bytes to an I/O port."""
        self.command(f"out{_WIDTHS[size]} {port:#x} {value:#x}")

    def _number(self, line: str, size: int) -> int:
        words = self.command(line)
        try:
            number = int(words[0], 16)
        except (IndexError, ValueError):
            raise PeerError(f"QEMU answers {line!r} with {words}, not with a number") from None
        if not 0 <= number < 1 << 8 * size:
            raise PeerError(f"QEMU answers {line!r} with {number:#x}, which has more than {size} bytes")
        return number

    def intercept(self, controller: str) -> None:
        """Report the input lines of an interrupt controller instead of raising them there, such as ``ioapic``."""
        self.command(f"irq_intercept_in {controller}")

    def step_clock(self, nanoseconds: int | None = None) -> None:
        """Move the virtual clock, to its next deadline when None; only with ``-accel qtest`` does it stand still."""
        self.command("clock_step" if nanoseconds is None else f"clock_step {nanoseconds}")
