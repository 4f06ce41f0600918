"""One virtqueue as the back-end keeps it: what the front-end has said of it, and when it runs.

Theory
------
Two states are independent of each other. A ring is *started* by its kick fd (or by an in-band kick) and
*stopped* by GET_VRING_BASE; it is *enabled* and *disabled* by SET_VRING_ENABLE, or enabled once and for all by
a front-end that does not negotiate protocol features. It *runs* while it is started, enabled and not broken, its
size and addresses are known and its areas lie in shared memory. Whatever a message changes, `Rings.update`
compares what should run with what does, so no order of messages needs a case of its own.

A ring that ceases to run keeps its position, and goes on there. It begins anew with SET_VRING_BASE, and that
is also what clears a broken ring: whoever sets a ring up anew (after GET_VRING_BASE, or, as UML does, after no
message at all) has seen that it stopped.

Position: of a split ring the message carries the avail index, and the used index stands in memory. Of a packed
ring bits 0 to 15 carry offset and wrap counter; used follows avail, since whoever stops a ring drains it. Where there
is a record of what is in flight (`records`), it says both, and the base does not count: a front-end whose back-end
died knows no better (QEMU sends the used index, or for a packed ring what it sent last). So bits 16 to 31 are never
read. Base 0 for a ring that this front-end never read back is a fresh ring, however little that fits the format: UML
sends 0 always.
"""

from __future__ import annotations

import errno
import os
import select
import stat
from pathlib import Path
from typing import Final

from virtio_test._core import DeviceQueue, GuestMemory, Notifier, Policy, QueueConfig, QueueState, RingLayout
from virtio_test.errors import InvalidArgument
from virtio_test.sockets.fds import EVENTFD, OwnedFd, kernel_name

from .payloads import VringAddress
from .rules import violation

__all__ = ["FRESH_PACKED", "Kick", "Ring", "checked_notifier"]

FRESH_PACKED: Final = 0x8000
MAX_SIZE: Final = 32768
"""No message tells a front-end how large the device would have its queues; UML makes all of them 256."""
_PACKED: Final = 1 << 34


class Ring:
    """What is known of one virtqueue.

    Attributes:
        index: its number.
        size: number of descriptors; None before SET_VRING_NUM.
        address: the front-end's addresses; None before SET_VRING_ADDR.
        base: the value of SET_VRING_BASE that has not been used yet.
        position: where the ring stopped.
        drained: whether it has run and stopped, with nothing in flight.
        read_back: whether this front-end has read the base.
        started: by a kick fd or an in-band kick, and not stopped since.
        enabled: by SET_VRING_ENABLE, or by a front-end without protocol features.
        broken: why it was stopped by us.
        kick: what the front-end wakes us with.
        call: what we wake the front-end with.
        call_owed: whether there was a call while there was nothing to call with.
        error: what we tell the front-end with that the ring is broken.
        error_owed: whether it broke while there was nothing to tell it with.
        queue: the running queue.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.enabled = False
        self.call: Notifier | None = None
        self.error: Notifier | None = None
        self.kick: Kick | None = None
        self.queue: DeviceQueue | None = None
        self.forget()

    def __repr__(self) -> str:
        states = ("started", "enabled", "running", "broken")
        return f"<Ring {self.index}: {', '.join(name for name in states if getattr(self, name)) or 'stopped'}>"

    def forget(self) -> None:
        """Back to what a ring is before the first message about it; fds and `enabled` stay."""
        self.size: int | None = None
        self.address: VringAddress | None = None
        self.base: int | None = None
        self.position: QueueState | None = None
        self.drained = False
        self.read_back = False
        self.started = False
        self.broken: Exception | None = None
        self.call_owed = False
        self.error_owed = False

    @property
    def running(self) -> bool:
        """Whether the device works on it."""
        return self.queue is not None

    @property
    def wanted(self) -> bool:
        """Whether it should run, as far as messages alone decide."""
        return self.started and self.enabled and self.broken is None and self.address is not None

    def set_size(self, size: int, *, packed: bool) -> None:
        """Take SET_VRING_NUM.

        Raises:
            MessageError: VringSize.
        """
        _check_size(size, self.index, packed=packed)
        self.size = size

    def check_base(self, value: int, *, packed: bool) -> None:
        """Judge SET_VRING_BASE.

        Raises:
            MessageError: VringBase.
        """
        if not packed and value > 0xFFFF:
            raise violation("VringBase", f"base {value:#x}, where 16 bits are legal", queue=self.index)
        if packed and self.size is not None and (value & 0x7FFF) >= self.size:
            raise violation("VringBase", f"base {value:#x} of a ring of {self.size} descriptors", queue=self.index)

    def set_base(self, value: int) -> None:
        """Take SET_VRING_BASE; the ring begins anew."""
        self.base = value & 0xFFFF
        self.position = None
        self.broken = None
        self.error_owed = False

    def layout(self, address: VringAddress, *, packed: bool) -> RingLayout:
        """Sizes of the three areas, with the front-end's addresses as their places.

        Raises:
            MessageError: VringOrder, the size is not known yet; VringSize, it was taken for the other kind of ring.
        """
        if self.size is None:
            raise violation("VringOrder", "its addresses come before its size", queue=self.index)
        _check_size(self.size, self.index, packed=packed)
        return RingLayout(
            self.size, packed=packed, desc=address.descriptor, driver=address.available, device=address.used
        )

    def reply_base(self, *, packed: bool) -> int:
        """What GET_VRING_BASE answers: both halves of a packed ring, the avail index of a split one."""
        if self.position is not None:
            return self.position.avail | self.position.used << 16 if packed else self.position.avail
        base = self._base(packed=packed)
        return base | base << 16 if packed else base

    def _base(self, *, packed: bool) -> int:
        base = self.base or 0
        return FRESH_PACKED if packed and base == 0 and not self.read_back else base

    def start_state(self, memory: GuestMemory, layout: RingLayout, *, packed: bool) -> QueueState:
        """Where a queue over `layout` (guest addresses) goes on; the queue judges whether it can be there."""
        if self.position is not None:
            return self.position
        base = self._base(packed=packed)
        if packed:
            return QueueState(base)
        used = int.from_bytes(memory.read(layout.at("used.idx"), 2), "little")
        return QueueState(base, used)

    def queue_config(self, layout: RingLayout, features: int, policy: Policy) -> QueueConfig:
        """The configuration of a queue over `layout`, in guest addresses."""
        return QueueConfig.from_layout(layout, index=self.index, features=features, policy=policy)


def _check_size(size: int, index: int, *, packed: bool) -> None:
    if not 1 <= size <= MAX_SIZE or (not packed and size & (size - 1)):
        kind = "a number" if packed else "a power of two"
        raise violation("VringSize", f"size {size}, where {kind} from 1 to {MAX_SIZE} is legal", queue=index)


def checked_notifier(fd: OwnedFd, index: int | None) -> Notifier:
    """A notifier over a duplicate of `fd`, to call with; UML's "pipes" are sockets.

    Raises:
        MessageError: FdType; a file is no way to wake anybody.
    """
    _check_kind(fd, index, sockets=True)
    try:
        return Notifier.from_fd(fd.fileno())
    except InvalidArgument as error:
        raise violation("FdType", str(error), queue=index) from error


class Kick:
    """What a front-end wakes us with: an eventfd or a pipe.

    Others hold it too, and can take what poll has announced before we read it. So a read never relies on poll: it
    is one that cannot wait.

    Args:
        fd: duplicated; what it came with may close it.
        index: queue that it belongs to.

    Raises:
        MessageError: FdType; a file or /dev/zero would be readable for ever, and so is a socket that listens or
            whose other end is shut down by half. A semaphore gives back one at a time what was added at once.
    """

    def __init__(self, fd: OwnedFd, index: int) -> None:
        _check_kind(fd, index, sockets=False)
        if "eventfd-semaphore: 1" in Path(f"/proc/self/fdinfo/{fd.fileno()}").read_text("ascii"):
            raise violation("FdType", "the fd is an eventfd that counts down like a semaphore", queue=index)
        self._fd = OwnedFd(os.dup(fd.fileno()))
        self._pipe = stat.S_ISFIFO(os.fstat(fd.fileno()).st_mode)

    def __repr__(self) -> str:
        return f"<Kick {'pipe' if self._pipe else 'eventfd'} {self.fileno()}>"

    def fileno(self) -> int:
        """The fd to wait on."""
        return self._fd.fileno()

    def drain(self) -> bool:
        """Take what is there; whether there was anything."""
        try:
            # An eventfd gives its 8 bytes; what is left in a pipe is taken in the next turn.
            return os.preadv(self.fileno(), [bytearray(4096)], -1, os.RWF_NOWAIT) > 0
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP or not self._pipe:
                return False
        # Pipes before Linux 6.4. The end that is read is ours alone, as a rule.
        os.set_blocking(self.fileno(), False)
        try:
            return bool(os.read(self.fileno(), 4096))
        except OSError:
            return False

    def hung_up(self) -> bool:
        """Whether nobody can write to it any more: a pipe whose other end is closed stays readable."""
        poll = select.poll()
        poll.register(self.fileno(), select.POLLIN)
        return any(events & (select.POLLHUP | select.POLLERR | select.POLLNVAL) for _, events in poll.poll(0))


def _check_kind(fd: OwnedFd, index: int | None, *, sockets: bool) -> None:
    mode = os.fstat(fd.fileno()).st_mode
    if stat.S_ISFIFO(mode) or (sockets and stat.S_ISSOCK(mode)):
        return
    if (name := kernel_name(fd.fileno())) != EVENTFD:
        raise violation("FdType", f"the fd is {name!r}", queue=index)
