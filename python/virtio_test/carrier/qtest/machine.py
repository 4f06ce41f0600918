"""`QtestMachine`: a QEMU machine whose devices our drivers reach, without a guest.

Theory
------
**Memory.** QEMU's RAM is a file; our `GuestMemory` maps the same file, so rings and buffers are shared as they are
with a real guest. The first MiB is left alone (a PC has ROM and video memory in it), and the last 64 KiB are a
region of their own for MSI-X: a device's message is a write, and a write can go to RAM as well. Each vector is
aimed at a word there, and the words are looked at every half millisecond while somebody listens.

**Lines.** All inputs of the I/O APIC are intercepted. QEMU reports every change, also in the middle of a command,
so a level is known as soon as the access that changed it has been answered. Whoever listens for a line is
called in turn after turn while it is raised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Final, Self

from virtio_test._core import GuestMemory
from virtio_test.clock import Timer, VirtualClock
from virtio_test.errors import InvalidArgument, StateError, VirtioTestError
from virtio_test.loop import OwnerLoop

from .mmio import QtestMmio
from .pci import PciBus, QtestPci
from .process import Machine, QemuProcess
from .protocol import Qtest

__all__ = ["QtestMachine"]

_LOW: Final = 1 << 20
_WORDS: Final = 64 << 10
_LOOK_SECONDS: Final = 0.0005


class QtestMachine:
    """A running machine; a context manager that ends it.

    Args:
        command: the words that start ``qemu-system-x86_64``.
        arguments: its devices, in QEMU's own words.
        machine: ``q35``, ``pc`` or ``microvm``.
        env: its environment; ours when None.
        ram: bytes of RAM.
        loop: the loop that interrupts arrive in, in real time as QEMU itself; one of its own when None.
        timeout: real seconds that one access takes at most.
        exit_with_parent: see `QemuProcess`.

    Attributes:
        process: the QEMU.
        qtest: its test protocol.
        memory: the machine's RAM without the first MiB.
        loop: the owner loop of its drivers.

    Raises:
        InvalidArgument: a loop with a virtual clock, or what `QemuProcess` refuses.
        PeerDisconnected, PeerTimeout: it does not come up; with its last words.
    """

    def __init__(
        self,
        command: Sequence[str] = ("qemu-system-x86_64",),
        arguments: Sequence[str] = (),
        *,
        machine: Machine = "q35",
        env: Mapping[str, str] | None = None,
        ram: int = 64 << 20,
        loop: OwnerLoop | None = None,
        timeout: float = 10.0,
        exit_with_parent: bool = True,
    ) -> None:
        if loop is not None and isinstance(loop.clock, VirtualClock):
            raise InvalidArgument("the loop has a virtual clock, but QEMU lives in real time: use a MonotonicClock")
        self.loop = OwnerLoop() if loop is None else loop
        self._raised: set[int] = set()
        self._lines: dict[object, tuple[Callable[[], bool], Callable[[], object]]] = {}
        self._words: dict[int, Callable[[], object]] = {}
        self._free_words = list(range(ram - 4, ram - _WORDS - 4, -4))
        self._look: Timer | None = None
        self._reading = False
        self.process = QemuProcess(
            command, arguments, machine=machine, env=env, ram=ram, exit_with_parent=exit_with_parent
        )
        self.qtest = Qtest(
            self.process.channel, timeout=timeout, on_irq=self._line_changed, last_words=self.process.last_words
        )
        try:
            self.memory = GuestMemory()
            with self.process.ram_path.open("r+b") as file:
                self.memory.add_region(_LOW, ram - _WORDS - _LOW, fd=file.fileno(), offset=_LOW)
                self.memory.add_region(ram - _WORDS, _WORDS, fd=file.fileno(), offset=ram - _WORDS)
            self.qtest.intercept("ioapic")
            self._bus = None if machine == "microvm" else PciBus(self.qtest, machine)
            self.loop.add_reader(self.qtest.fileno(), self._take_events)
            self._reading = True
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"<QtestMachine {self.process.machine}, {'running' if self.process.running else 'ended'}>"

    # --- what is on it --------------------------------------------------------------------------------------

    def pci(self, slot: int, function: int = 0) -> QtestPci:
        """A function on the root bus.

        Raises:
            StateError: the machine has no PCI bus.
        """
        if self._bus is None:
            raise StateError(f"the machine {self.process.machine} has no PCI bus")
        return QtestPci(self, self._bus, slot, function)

    def mmio(self, index: int) -> QtestMmio:
        """The virtio-mmio transport ``virtio-mmio-bus.<index>`` of microvm.

        Raises:
            StateError: the machine has none.
        """
        if self.process.machine != "microvm":
            raise StateError(f"the machine {self.process.machine} has no virtio-mmio transports")
        return QtestMmio(self, index)

    def close(self) -> None:
        """End the machine; drivers that are still there get `PeerDisconnected`."""
        if self._look is not None:
            self._look.stop()
            self._look = None
        self._lines.clear()
        self.loop.unpend((self, "lines"))
        self._stop_reading()
        self.qtest.close()
        self.process.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- interrupts, for the accesses -----------------------------------------------------------------------

    def watch_line(self, key: object, mine: Callable[[], bool], line: Callable[[], object]) -> None:
        """While any input is raised and `mine()` holds, call `line` in turn after turn."""
        self._lines[key] = (mine, line)
        self._mark_lines()

    def raised(self, line: int) -> bool:
        """Whether that input of the I/O APIC is raised."""
        return line in self._raised

    def leave_line(self, key: object) -> None:
        """Undo `watch_line`."""
        self._lines.pop(key, None)

    def take_word(self, arrived: Callable[[], object]) -> int:
        """Address of a word of RAM for an MSI-X message; `arrived` is called in the loop for each one seen.

        Raises:
            StateError: all are taken.
        """
        if not self._free_words:
            raise StateError(f"all {_WORDS // 4} words for messages are taken")
        address = self._free_words.pop()
        self.memory.write(address, bytes(4))
        self._words[address] = arrived
        if self._look is None:
            self._look = Timer(self.loop.clock, self._look_for_messages, first_after=0.0, every=_LOOK_SECONDS)
        return address

    def drop_word(self, address: int) -> None:
        """Nobody waits for the message at `address` any more, and another may use the word."""
        if self._words.pop(address, None) is not None:
            self._free_words.append(address)
        if not self._words and self._look is not None:
            self._look.stop()
            self._look = None

    def _look_for_messages(self) -> None:
        for address, arrived in list(self._words.items()):
            if any(self.memory.read(address, 4)):
                # Cleared before it is told: a message that comes meanwhile is seen at the next look.
                self.memory.write(address, bytes(4))
                arrived()

    def _line_changed(self, line: int, raised: bool) -> None:  # noqa: FBT001 - a level has no better name
        if raised:
            self._raised.add(line)
            self._mark_lines()
        else:
            self._raised.discard(line)

    def _mark_lines(self) -> None:
        if self._raised and self._lines:
            self.loop.pend((self, "lines"), self._deliver_lines)

    def _deliver_lines(self) -> bool:
        for key, (mine, line) in list(self._lines.items()):
            if self._raised and key in self._lines and mine():
                line()
        return bool(self._raised and self._lines)

    def _take_events(self) -> None:
        try:
            self.qtest.take_events()
        except VirtioTestError:
            # Said once, to whoever waits in the loop; a socket that stays readable must not say it for ever.
            self._stop_reading()
            raise

    def _stop_reading(self) -> None:
        if self._reading:
            self._reading = False
            self.loop.remove_reader(self.qtest.fileno())
