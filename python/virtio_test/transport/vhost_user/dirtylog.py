"""The dirty log that a front-end shares: judged whole before anything is marked in it.

Theory
------
SET_LOG_BASE brings the log, the feature bit LOG_ALL turns marking on and off, and both happen while rings run: nothing
stops for them. The core marks every page that it writes (`GuestMemory.start_log`), whether or not a ring has the flag
that asks for its used ring to be marked: a mark too many costs the front-end a page to send, a mark too few its guest.

A log that does not cover the shared memory cannot say what it is there to say, so it is refused; and so is memory
beyond it while rings run. Where none runs the front-end is about to send a larger log, and the old one is forgotten.

Source: QEMU, docs/interop/vhost-user.rst, "Migration".
"""

from __future__ import annotations

import logging
import os
import stat
from typing import TYPE_CHECKING, Final

from virtio_test._core import Notifier
from virtio_test.errors import InvalidArgument, MessageError, VirtioTestError

from .codec import OwnedFd
from .messages import VRING_LOG
from .payloads import Log
from .rings import Ring
from .rules import violation

if TYPE_CHECKING:
    from .runner import RingSet

__all__ = ["LogFile", "Marking"]

_log: Final = logging.getLogger("virtio_test.vhost_user")
_PAGES_PER_BYTE: Final = 8
_PAGE: Final = 4096
_END: Final = 1 << 64


class LogFile:
    """One log, judged; the file is ours.

    Args:
        fd: its file, duplicated.
        log: where it lies in that.

    Raises:
        MessageError: LogRange, LogFile.
    """

    def __init__(self, fd: OwnedFd, log: Log) -> None:
        self.size, self.offset = log.size, log.offset
        text = f"a log of {log.size:#x} bytes from offset {log.offset:#x}"
        status = os.fstat(fd.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise violation("LogFile", f"{text}: its fd is no regular file")
        # DPDK's CVE-2020-10722: the sum was made in 64 bits.
        if log.size == 0 or log.offset + log.size > min(status.st_size, _END):
            raise violation("LogRange", f"{text}, and its file has {status.st_size:#x} bytes")
        self._fd = OwnedFd(os.dup(fd.fileno()))

    def __repr__(self) -> str:
        return f"<LogFile of {self.size} bytes>"

    def fileno(self) -> int:
        """The file, still owned by this object."""
        return self._fd.fileno()

    def close(self) -> None:
        """Close the file."""
        self._fd.close()

    def covers(self, end: int) -> bool:
        """Whether every page before `end` has its bit."""
        return -(-end // _PAGE) <= self.size * _PAGES_PER_BYTE


class Marking:
    """The dirty log of one session.

    Args:
        host: its rings.

    Attributes:
        on: whether pages that are written are to be marked, as soon as there is a log.
        log: the log; None before there is one.
        call: what says that something may have been marked, where the front-end wants to know.
    """

    def __init__(self, host: RingSet) -> None:
        self._host = host
        self.on = False
        self.log: LogFile | None = None
        self.call: Notifier | None = None
        self._elsewhere: list[tuple[int, int, int]] = []

    def __repr__(self) -> str:
        return f"<Marking {'on' if self.on else 'off'}, {self.log}>"

    def set_log(self, log: LogFile) -> None:
        """Mark what is written in `log`, ours from now on, as soon as that is wanted.

        Raises:
            MessageError: LogTooSmall, LogFile; the present one stays.
        """
        if not log.covers(self._host.memory.end):
            raise violation("LogTooSmall", f"{log}, and memory up to {self._host.memory.end:#x}")
        for ring in self._host.rings:
            self.check(ring, log)
        if self.on:
            self._start_log(log)
        if self.log is not None:
            self.log.close()
        self.log = log

    def turn(self, *, on: bool) -> None:
        """Mark what is written, or no more. No ring stops for that."""
        if on and not self.on and self.log is not None:
            self._start_log(self.log)
        elif self.on and not on:
            self._host.memory.memory.stop_log()
        self.on = on

    def forget(self) -> None:
        """Nothing is marked before there is another log."""
        if self.log is not None:
            self._host.memory.memory.stop_log()
            self.log.close()
            self.log = None

    def check(self, ring: Ring, log: LogFile) -> None:
        """Judge where a ring has its used ring logged.

        Raises:
            MessageError: LogTooSmall.
        """
        for _, size, at in self._moved(ring):
            if not log.covers(at + size):
                raise violation(
                    "LogTooSmall", f"the used ring is logged at {at:#x}, and {log} ends before", queue=ring.index
                )

    def moved(self, ring: Ring) -> None:
        """`ring` may have its used ring logged elsewhere from now on.

        Raises:
            MessageError: LogTooSmall, beyond the log.
        """
        if self.log is not None:
            self.check(ring, self.log)
        self.renew()

    def renew(self) -> None:
        """Rings may lie elsewhere now."""
        if self.on and self.log is not None and self._all_moved() != self._elsewhere:
            self._start_log(self.log)

    def make_room(self, end: int) -> None:
        """There will be memory up to `end`.

        Raises:
            MessageError: LogTooSmall, the log does not cover it, and rings run.
        """
        if self.log is not None and not self.log.covers(end):
            if self.on and self._host.running:
                raise violation("LogTooSmall", f"memory up to {end:#x}, and {self.log} while rings run")
            self.forget()

    def _moved(self, ring: Ring) -> list[tuple[int, int, int]]:
        """The used ring, if it is logged where it does not lie. With an IOTLB only the entries say where that is."""
        address = ring.address
        if address is None or ring.size is None or not address.flags & VRING_LOG or self._host.memory.cache is not None:
            return []
        try:
            layout = self._host.translate(ring.layout(address, packed=self._host.packed))
        except MessageError:
            # It has no layout, so it does not run.
            return []
        if layout is None or layout.device == address.log:
            return []
        return [(layout.device, layout.device_bytes, address.log)]

    def _all_moved(self) -> list[tuple[int, int, int]]:
        return [moved for ring in self._host.rings for moved in self._moved(ring)]

    def _start_log(self, log: LogFile) -> None:
        elsewhere = self._all_moved()
        try:
            self._host.memory.memory.start_log(log.fileno(), log.size, offset=log.offset, elsewhere=elsewhere)
        except (InvalidArgument, OSError) as error:
            raise violation("LogFile", str(error)) from error
        self._elsewhere = elsewhere

    def tell(self) -> None:
        """Something may have been marked."""
        if self.call is not None and self.on and self.log is not None:
            try:
                self.call.notify()
            except VirtioTestError as error:
                # It only harms itself.
                _log.info("the fd of the dirty log does not work: %s", error)
                self.call = None
