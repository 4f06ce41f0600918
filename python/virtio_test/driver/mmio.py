"""`MmioRegisters`: the driver's side of virtio-mmio, version 2 and the legacy version 1 (VIRTIO 1.4, 4.2).

Theory
------
The driver knows nothing of the device but what the registers read, and believes none of it: each value is judged
where it is used, beside its clause, and what cannot be is a `StatusViolation`. Magic number, version and device id
are read when the object is made, in this order and before anything else is touched (4.2.3.1.1).

**What a driver must wait for** (a queue's reset, a queue that is taken back) is polled: nothing tells a loop that
a register has changed. The wait is bounded by `timeout` seconds of the loop's clock; called from inside a turn, where
no other turn can run, by as many seconds of real time.

**An interrupt** is acknowledged before it is dispatched. Section 4.2.2.2 says "when it finishes handling", but what
the device adds while we handle would then be acknowledged unseen; acknowledged first, it is a new interrupt. A line
that stays asserted while no defined bit is set is a broken device, and `StatusViolation` after `MAX_SPURIOUS` turns.

MMIO says neither how many queues there are nor how long the configuration space is. Queues end before the first one
that is not available, the space at the end of the page that the platform gives the device (`size`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from virtio_test._core import GuestMemory, Notifier, QueueConfig
from virtio_test.clock import Timer
from virtio_test.errors import InvalidArgument, QueueViolation, StateError, StatusViolation
from virtio_test.loop import OwnerLoop
from virtio_test.spec.features import FEATURE_BY_NAME
from virtio_test.spec.mmio import (
    CONFIG,
    INTERRUPT_CONFIG,
    INTERRUPT_DEFINED,
    INTERRUPT_QUEUE,
    LEGACY_REGISTERS,
    MAGIC,
    NO_SHARED_MEMORY,
    REGISTERS,
    VERSION,
    VERSION_LEGACY,
)

from .access import MmioAccess

__all__ = ["MAX_QUEUES", "MAX_SPURIOUS", "MmioRegisters"]

MAX_QUEUES: Final = 1024
"""Queues that a device may have here; 2.6 would allow 65536, but a device without an end is more likely broken."""

MAX_SPURIOUS: Final = 1000
"""Turns in a row in which the line may be asserted without a cause."""

_MAX_SIZE: Final = 32768
_ALIGN: Final = 4096
_WORD: Final = 0xFFFF_FFFF
_WORDS: Final = 4
_POLL_SECONDS: Final = 0.001
_STABLE_TRIES: Final = 100
_PACKED: Final = 1 << FEATURE_BY_NAME["RING_PACKED"].bit
_NOTIFICATION_DATA: Final = 1 << FEATURE_BY_NAME["NOTIFICATION_DATA"].bit


class MmioRegisters:
    """`Registers` over one page of virtio-mmio.

    Args:
        access: how the page is reached.
        size: bytes of the page, the configuration space included.
        timeout: seconds that waits for the device take at most.

    Attributes:
        version: 2, or 1 for the legacy interface.
        spurious: interrupts without a cause, since the last one with one.

    Raises:
        StatusViolation: `BadMagic` or `UnknownVersion`: this is no virtio device, or none that we know.
        StateError: the device id is 0: there is no device here.
    """

    def __init__(self, access: MmioAccess, *, size: int = 0x1000, timeout: float = 1.0) -> None:
        if size < CONFIG:
            raise InvalidArgument(f"a page of {size} bytes has no room for the {CONFIG} bytes of control registers")
        self.access = access
        self.size = size
        self.timeout = timeout
        self.spurious = 0
        self._call: Callable[[int], object] = lambda _: None
        self._changed: Callable[[], object] = lambda: None
        self._features = 0
        self._ready: set[int] = set()
        magic = access.read(REGISTERS["MagicValue"].offset, 4)
        if magic != MAGIC:
            raise StatusViolation("BadMagic", "4.2.2.2", f"MagicValue is {magic:#x}, virtio-mmio has {MAGIC:#x}")
        self.version = access.read(REGISTERS["Version"].offset, 4)
        if self.version not in (VERSION, VERSION_LEGACY):
            message = f"Version is {self.version:#x}; known are {VERSION} and the legacy {VERSION_LEGACY}"
            raise StatusViolation("UnknownVersion", "4.2.2.2", message)
        self._table = REGISTERS if self.version == VERSION else LEGACY_REGISTERS
        if self.device_id() == 0:
            raise StateError("the device id is 0: there is no device here")

    def __repr__(self) -> str:
        return f"<MmioRegisters version {self.version}, queues {sorted(self._ready)}>"

    # --- registers ------------------------------------------------------------------------------------------

    def read(self, name: str) -> int:
        """The value of a control register."""
        return self.access.read(self._table[name].offset, 4)

    def write(self, name: str, value: int) -> None:
        """Write a control register."""
        self.access.write(self._table[name].offset, 4, value)

    @property
    def loop(self) -> OwnerLoop:
        """See `Registers.loop`."""
        return self.access.loop

    @property
    def memory(self) -> GuestMemory:
        """See `Registers.memory`."""
        return self.access.memory

    @property
    def transport(self) -> str | None:
        """See `Registers.transport`."""
        return "mmio"

    @property
    def legacy(self) -> bool:
        """See `Registers.legacy`: version 1."""
        return self.version == VERSION_LEGACY

    def device_id(self) -> int:
        """See `Registers.device_id`."""
        return self.read("DeviceID")

    def vendor_id(self) -> int:
        """The vendor id, 32 bits."""
        return self.read("VendorID")

    def device_features(self) -> int:
        """See `Registers.device_features`."""
        if self.legacy:
            return self._feature_word("Host", 0)
        return sum(self._feature_word("Device", select) << 32 * select for select in range(_WORDS))

    def _feature_word(self, prefix: str, select: int) -> int:
        self.write(f"{prefix}FeaturesSel", select)
        return self.read(f"{prefix}Features")

    def write_driver_features(self, features: int) -> None:
        """See `Registers.write_driver_features`."""
        prefix = "Guest" if self.legacy else "Driver"
        # Beyond the second word only what is accepted: QEMU takes any selector above 0 for 1, and a word of zeros there
        # would take the second one back.
        words = 1 if self.legacy else max(2, (features.bit_length() + 31) // 32)
        for select in range(words):
            self.write(f"{prefix}FeaturesSel", select)
            self.write(f"{prefix}Features", features >> 32 * select & _WORD)
        self._features = features

    def read_status(self) -> int:
        """See `Registers.read_status`."""
        return self.read("Status")

    def write_status(self, status: int) -> None:
        """See `Registers.write_status`."""
        if status == 0:
            self._ready.clear()
            self._features = 0
        self.write("Status", status)

    # --- queues ---------------------------------------------------------------------------------------------

    def queue_max_sizes(self) -> list[int]:
        """See `Registers.queue_max_sizes`.

        Raises:
            QueueViolation: `QueueSizeMaxTooLarge` or `QueueSizeMaxNoPowerOfTwo` (2.7), where the queue is split.
            StatusViolation: `TooManyQueues`: more than `MAX_QUEUES`.
        """
        sizes: list[int] = []
        while size := self._queue_max_size(len(sizes)):
            if len(sizes) == MAX_QUEUES:
                raise StatusViolation("TooManyQueues", "4.2.2", f"more than {MAX_QUEUES} queues are available")
            sizes.append(size)
        return sizes

    def _queue_max_size(self, index: int) -> int:
        self.write("QueueSel", index)
        size = self.read("QueueSizeMax")
        if size > _MAX_SIZE:
            message = f"QueueSizeMax is {size}, a queue has {_MAX_SIZE} entries at most"
            raise QueueViolation("QueueSizeMaxTooLarge", "2.7", message, queue=index)
        if not self._features & _PACKED and size & (size - 1):
            message = f"QueueSizeMax is {size}, the size of a split queue is a power of two"
            raise QueueViolation("QueueSizeMaxNoPowerOfTwo", "2.7", message, queue=index)
        return size

    def kick_notifier(self, index: int, position: Callable[[], int]) -> Notifier:
        """See `Registers.kick_notifier`."""

        def kick() -> None:
            carried = position() << 16 if self._features & _NOTIFICATION_DATA else 0
            self.write("QueueNotify", index | carried)

        return Notifier.callback(kick)

    def enable_queue(self, config: QueueConfig) -> None:
        """See `Registers.enable_queue`.

        Raises:
            QueueViolation: `QueueInUse` or `QueueNotReady`: the device has the queue already, or does not take it.
            InvalidArgument: a legacy queue that does not lie as `Registers.legacy` says.
        """
        name = "QueuePFN" if self.legacy else "QueueReady"
        self.write("QueueSel", config.index)
        if used := self.read(name):
            raise QueueViolation("QueueInUse", "4.2.3.2", f"{name} reads {used:#x} before set-up", queue=config.index)
        if self.legacy:
            self._place(config)
            expected = config.desc // _ALIGN
        else:
            self.write("QueueSize", config.size)
            for area, address in (("Desc", config.desc), ("Driver", config.driver), ("Device", config.device)):
                self.write(f"Queue{area}Low", address & _WORD)
                self.write(f"Queue{area}High", address >> 32)
            self.write("QueueReady", 1)
            expected = 1
        if (read := self.read(name)) != expected:
            message = f"{name} reads {read:#x} after {expected:#x} was written"
            raise QueueViolation("QueueNotReady", "4.2.2", message, queue=config.index)
        self._ready.add(config.index)

    def _place(self, config: QueueConfig) -> None:
        page, remainder = divmod(config.desc, _ALIGN)
        if remainder or not 0 < page <= _WORD:
            raise InvalidArgument(
                f"a legacy queue at {config.desc:#x} is at no page of {_ALIGN} bytes that has a number"
            )
        self.write("GuestPageSize", _ALIGN)
        self.write("QueueSize", config.size)
        self.write("QueueAlign", _ALIGN)
        self.write("QueuePFN", page)

    def disable_queue(self, index: int) -> None:
        """Stop using a queue; when this returns, the device has let go of it (4.2.2.2).

        Raises:
            QueueViolation: `QueueStaysReady`: it has not, within the bound.
        """
        name = "QueuePFN" if self.legacy else "QueueReady"
        self.write("QueueSel", index)
        self.write(name, 0)
        if not self._wait(lambda: self._read_of(index, name) == 0):
            raise QueueViolation("QueueStaysReady", "4.2.2.2", f"{name} never reads 0 back", queue=index)
        self._ready.discard(index)

    def reset_queue(self, index: int) -> None:
        """See `Registers.reset_queue`.

        Raises:
            QueueViolation: `QueueResetEndless` or `QueueStaysReady`: the queue is not reset within the bound.
        """
        self.write("QueueSel", index)
        self.write("QueueReset", 1)
        if not self._wait(lambda: self._read_of(index, "QueueReset") == 0):
            raise QueueViolation("QueueResetEndless", "4.2.2.1", "QueueReset never reads 0 back", queue=index)
        if ready := self._read_of(index, "QueueReady"):
            message = f"QueueReady reads {ready:#x} after the queue was reset"
            raise QueueViolation("QueueStaysReady", "4.2.2.1", message, queue=index)
        self._ready.discard(index)

    def _read_of(self, index: int, name: str) -> int:
        self.write("QueueSel", index)
        return self.read(name)

    def _wait(self, done: Callable[[], bool]) -> bool:
        """Poll until `done()`; False when the bound was reached."""
        if done():
            return True
        if self.loop.running:
            end = time.monotonic() + self.timeout
            while time.monotonic() < end:
                time.sleep(_POLL_SECONDS)
                if done():
                    return True
            return False
        poll = Timer(self.loop.clock, lambda: None, first_after=_POLL_SECONDS, every=_POLL_SECONDS)
        try:
            return self.loop.run(until=done, timeout=self.timeout)
        finally:
            poll.stop()

    # --- configuration space --------------------------------------------------------------------------------

    def config_size(self) -> int:
        """See `Registers.config_size`: the room behind the control registers, which may be more than the device has."""
        return self.size - CONFIG

    def config_generation(self) -> int:
        """See `Registers.config_generation`; the legacy interface has none, and `read_config` makes up for it."""
        return 0 if self.legacy else self.read("ConfigGeneration")

    def read_config(self, offset: int, length: int) -> bytes:
        """See `Registers.read_config`.

        Raises:
            StatusViolation: `ConfigNeverStable`, of a legacy device: no two looks gave the same.
        """
        data = self._read_config(offset, length)
        if not self.legacy:
            return data
        # Without a generation two equal looks are all that tells a value from a torn one (2.5.4).
        for _ in range(_STABLE_TRIES):
            before, data = data, self._read_config(offset, length)
            if data == before:
                return data
        raise StatusViolation("ConfigNeverStable", "2.5", f"each of {_STABLE_TRIES} looks gave another value")

    def _read_config(self, offset: int, length: int) -> bytes:
        return b"".join(
            (self.access.read(CONFIG + at, width) & (1 << 8 * width) - 1).to_bytes(width, "little")
            for at, width in self._accesses(offset, length)
        )

    def write_config(self, offset: int, data: bytes) -> None:
        """See `Registers.write_config`."""
        for at, width in self._accesses(offset, len(data)):
            value = int.from_bytes(data[at - offset : at - offset + width], "little")
            self.access.write(CONFIG + at, width, value)

    def _accesses(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Offset and width of each access: as wide as a field of that length; bytes where it cannot be one field."""
        width = {2: 2, 4: 4, 8: 4}.get(length, 1)
        if self.legacy or offset % width:
            width = 1
        return [(at, width) for at in range(offset, offset + length, width)]

    # --- interrupts -----------------------------------------------------------------------------------------

    def listen(self, *, call: Callable[[int], object], config_changed: Callable[[], object]) -> None:
        """See `Registers.listen`."""
        self._call = call
        self._changed = config_changed
        self.spurious = 0
        self.access.listen(line=self._line)

    def _line(self) -> None:
        status = self.read("InterruptStatus") & INTERRUPT_DEFINED
        if not status:
            self.spurious += 1
            if self.spurious == MAX_SPURIOUS:
                self.access.listen(line=lambda: None)
                message = f"the line was asserted {MAX_SPURIOUS} times while InterruptStatus had no defined bit"
                raise StatusViolation("InterruptWithoutCause", "4.2.2.1", message)
            return
        self.spurious = 0
        self.write("InterruptACK", status)
        if status & INTERRUPT_QUEUE:
            for index in sorted(self._ready):
                self._call(index)
        if status & INTERRUPT_CONFIG:
            self._changed()

    # --- shared memory --------------------------------------------------------------------------------------

    def shared_memory(self, number: int) -> tuple[int, int] | None:
        """Guest address and bytes of a shared memory region; None when there is none of that id.

        Raises:
            StateError: this is a legacy device.
            StatusViolation: `BadSharedMemory`: it leaves the address space.
        """
        if self.legacy:
            raise StateError("the legacy interface has no shared memory regions")
        self.write("SHMSel", number)
        size = self.read("SHMLenHigh") << 32 | self.read("SHMLenLow")
        base = self.read("SHMBaseHigh") << 32 | self.read("SHMBaseLow")
        if size == NO_SHARED_MEMORY:
            return None
        if base + size > NO_SHARED_MEMORY:
            message = f"region {number} of {size:#x} bytes at {base:#x} leaves the address space"
            raise StatusViolation("BadSharedMemory", "4.2.2", message)
        return base, size
