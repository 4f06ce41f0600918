"""The device's interrupts, as eventfds of the client.

Theory
------
A client gives each interrupt an eventfd (TRIGGER). An MSI-X vector without one is dropped, as the interrupt of a
driver that does not listen. A masked interrupt is remembered, once, and comes when it is unmasked.

**INTx is a level**, and an eventfd is not. So it masks itself: when the line is asserted the eventfd is written
once, and not again before the client unmasks the interrupt, which it does when the guest has acknowledged it. If
the line is still asserted then, the eventfd is written again. QEMU takes every access to a region as that
acknowledgement and unmasks by a message; where KVM acknowledges, it writes an eventfd (UNMASK with DATA_EVENTFD).
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Final

from virtio_test._core import Notifier
from virtio_test.errors import InvalidArgument, MessageError
from virtio_test.loop import OwnerLoop
from virtio_test.sockets.fds import EVENTFD, OwnedFd, kernel_name
from virtio_test.transport.vhost_user.rings import Kick

from .messages import IrqIndex, IrqSet
from .payloads import IrqInfo, SetIrqs
from .rules import Refused

__all__ = ["Interrupts"]

_EVENTFD: Final = 1
_MASKABLE: Final = 2
_AUTOMASKED: Final = 4
_NORESIZE: Final = 8
_DATA: Final = IrqSet.DATA_NONE | IrqSet.DATA_BOOL | IrqSet.DATA_EVENTFD
_ACTIONS: Final = IrqSet.MASK | IrqSet.UNMASK | IrqSet.TRIGGER


class _Interrupt:
    """One interrupt: where it goes, and whether it may."""

    __slots__ = ("masked", "pending", "trigger")

    def __init__(self) -> None:
        self.trigger: Notifier | None = None
        self.masked = False
        self.pending = False

    def fire(self) -> None:
        """An event: it goes out, or waits for being unmasked."""
        if self.masked:
            self.pending = True
        elif self.trigger is not None:
            self.trigger.notify()

    def unmask(self) -> None:
        self.masked = False
        if self.pending:
            self.pending = False
            self.fire()

    def assign(self, trigger: Notifier | None) -> None:
        self.trigger = trigger
        if trigger is None:
            self.masked = self.pending = False


class _Line(_Interrupt):
    """INTx: a level, which masks itself when it has fired."""

    __slots__ = ("asserted",)

    def __init__(self) -> None:
        super().__init__()
        self.asserted = False

    def set(self, asserted: bool) -> None:  # noqa: FBT001 - a level has no better name
        self.asserted = asserted
        self._look()

    def unmask(self) -> None:
        self.masked = False
        self._look()

    def assign(self, trigger: Notifier | None) -> None:
        # Whoever listens anew has acknowledged nothing, and finds the line as it is.
        self.trigger = trigger
        self.masked = False
        self._look()

    def _look(self) -> None:
        if self.asserted and not self.masked and self.trigger is not None:
            self.masked = True
            self.trigger.notify()


class Interrupts:
    """All interrupts of one client's connection; it is the function's `InterruptSink`.

    Args:
        loop: the owner loop.
        vectors: MSI-X vectors of the function.
        has_line: whether it has INTx.
    """

    def __init__(self, loop: OwnerLoop, *, vectors: int, has_line: bool) -> None:
        self._loop = loop
        self._line = _Line()
        self._vectors = [_Interrupt() for _ in range(vectors)]
        # ERR and REQ never come by themselves; a client may listen to them, and cause them to see that it does.
        self._types: dict[int, tuple[Sequence[_Interrupt], int]] = {
            IrqIndex.INTX: ([self._line] if has_line else [], _EVENTFD | _MASKABLE | _AUTOMASKED),
            IrqIndex.MSI: ([], 0),
            IrqIndex.MSIX: (self._vectors, _EVENTFD | _MASKABLE if vectors else 0),
            IrqIndex.ERR: ([_Interrupt()], _EVENTFD | _NORESIZE),
            IrqIndex.REQ: ([_Interrupt()], _EVENTFD | _NORESIZE),
        }
        self._resample: Kick | None = None

    def __repr__(self) -> str:
        heard = sum(each.trigger is not None for each in self._vectors)
        return f"<Interrupts: INTx {'on' if self._line.trigger else 'off'}, {heard} of {len(self._vectors)} vectors>"

    # --- the function's side --------------------------------------------------------------------------------

    def message(self, vector: int, address: int, data: int) -> None:  # noqa: ARG002 - as the protocol has it
        """See `InterruptSink.message`; the client knows the vector's address and data itself."""
        if 0 <= vector < len(self._vectors):
            self._vectors[vector].fire()

    def line(self, asserted: bool) -> None:  # noqa: FBT001 - as the protocol has it
        """See `InterruptSink.line`."""
        self._line.set(asserted)

    # --- the client's side ----------------------------------------------------------------------------------

    @property
    def types(self) -> int:
        """How many types of interrupt there are."""
        return len(self._types)

    def info(self, index: int) -> IrqInfo:
        """What one type of interrupt can do.

        Raises:
            Refused: there is no such type.
        """
        interrupts, flags = self._type(index)
        return IrqInfo(IrqInfo.sizes()[0], flags, index, len(interrupts))

    def _type(self, index: int) -> tuple[Sequence[_Interrupt], int]:
        found = self._types.get(index)
        if found is None:
            raise Refused(errno.EINVAL, "IrqIndex", f"interrupt type {index} of {len(self._types)}")
        return found

    def set(self, asked: SetIrqs, fds: Sequence[OwnedFd]) -> None:
        """Do what DEVICE_SET_IRQS asks.

        Raises:
            Refused: nothing was changed.
        """
        interrupts, _ = self._type(asked.index)
        flags = IrqSet(asked.flags & (_DATA | _ACTIONS))
        data, action = flags & _DATA, flags & _ACTIONS
        if asked.flags != flags or data.bit_count() != 1 or action.bit_count() != 1:
            raise Refused(errno.EINVAL, "IrqFlags", f"flags {asked.flags:#x}")
        if len(asked.data) != (asked.count if data == IrqSet.DATA_BOOL else 0):
            raise Refused(errno.EINVAL, "IrqData", f"{len(asked.data)} bytes of data for {asked.count} interrupts")
        if flags == IrqSet.DATA_NONE | IrqSet.TRIGGER and not asked.count and not asked.start:
            self._disable(interrupts)
            return
        if not asked.count or asked.start + asked.count > len(interrupts):
            raise Refused(
                errno.EINVAL, "IrqRange", f"{asked.count} from {asked.start} on, and there are {len(interrupts)}"
            )
        chosen = interrupts[asked.start : asked.start + asked.count]
        if data == IrqSet.DATA_EVENTFD:
            self._assign(asked.index, action, chosen, fds)
            return
        for at, interrupt in enumerate(chosen):
            if data == IrqSet.DATA_NONE or asked.data[at]:
                if action == IrqSet.MASK:
                    interrupt.masked = True
                elif action == IrqSet.UNMASK:
                    interrupt.unmask()
                elif interrupt.trigger is not None:
                    # The client causes it itself: whatever its state, the eventfd is written.
                    interrupt.trigger.notify()

    def _disable(self, interrupts: Sequence[_Interrupt]) -> None:
        for interrupt in interrupts:
            interrupt.assign(None)
        if self._line in interrupts:
            self._set_resample(None)

    def _assign(self, index: int, action: IrqSet, chosen: Sequence[_Interrupt], fds: Sequence[OwnedFd]) -> None:
        for fd in fds:
            _check_eventfd(fd)
        if action == IrqSet.TRIGGER:
            notifiers = [_notifier(fd) for fd in fds] if fds else [None] * len(chosen)
            for interrupt, notifier in zip(chosen, notifiers, strict=True):
                interrupt.assign(notifier)
        elif action == IrqSet.UNMASK and index == IrqIndex.INTX:
            self._set_resample(fds[0] if fds else None)
        else:
            raise Refused(errno.ENOTTY, "IrqFlags", f"an eventfd that masks or unmasks interrupts of type {index}")

    def _set_resample(self, fd: OwnedFd | None) -> None:
        """The eventfd that unmasks INTx."""
        try:
            given = None if fd is None else Kick(fd, 0)
        except MessageError as error:
            raise Refused(errno.EINVAL, "IrqFd", error.message) from error
        if self._resample is not None:
            self._loop.remove_reader(self._resample.fileno())
        self._resample = given
        if given is not None:
            self._loop.add_reader(given.fileno(), self._resampled)

    def _resampled(self) -> None:
        if self._resample is not None and self._resample.drain():
            self._line.unmask()

    def close(self) -> None:
        """The client has gone: all its eventfds are closed."""
        self._set_resample(None)
        for interrupts, _ in self._types.values():
            for interrupt in interrupts:
                interrupt.trigger = None


def _check_eventfd(fd: OwnedFd) -> None:
    if (name := kernel_name(fd.fileno())) != EVENTFD:
        raise Refused(errno.EINVAL, "IrqFd", f"the fd is {name!r}")


def _notifier(fd: OwnedFd) -> Notifier:
    try:
        return Notifier.from_fd(fd.fileno())
    except InvalidArgument as error:
        raise Refused(errno.EINVAL, "IrqFd", str(error)) from error
