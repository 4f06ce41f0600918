"""`LegacyPciRegisters`: the legacy interface in I/O BAR 0 (VIRTIO 1.4, 4.1.4.10), as any driver sees it.

There is no capability to read, no number of queues, no generation: a queue exists if its size is not 0, and a value
of the configuration space counts once two reads agree. With MSI-X enabled the header has two more registers, and
the configuration space begins after them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from virtio_test._core import GuestMemory, Notifier, QueueConfig, RingLayout
from virtio_test.errors import InvalidArgument, NoFeature, StatusViolation
from virtio_test.loop import OwnerLoop
from virtio_test.spec.pci import LEGACY, LEGACY_CONFIG, LEGACY_CONFIG_MSIX, LEGACY_QUEUE_ALIGN
from virtio_test.spec.status import Status

from .interrupts import Interrupts
from .modern import config_steps
from .probe import Findings, PciFunction

__all__ = ["LegacyPciRegisters"]

_BAR: Final = 0
_MAX_QUEUES: Final = 1024
_EMPTY_IN_A_ROW: Final = 8
_MAX_SIZE: Final = 32768
_CONFIG_TRIES: Final = 100


class LegacyPciRegisters:
    """`Registers` over the legacy interface; `open_pci` makes it.

    Args:
        function: the function, with BAR 0 placed and decoded.
        interrupts: made for this function.

    Attributes:
        function: the function.
        interrupts: which vectors are in use.
    """

    def __init__(self, function: PciFunction, interrupts: Callable[[Callable[[], int]], Interrupts]) -> None:
        self.function = function
        self._access = function.access
        self._size = function.bars[_BAR].size
        self.interrupts = interrupts(lambda: self.read("isr_status"))
        self._config = LEGACY_CONFIG_MSIX if self.interrupts.kind == "msix" else LEGACY_CONFIG

    def __repr__(self) -> str:
        return f"<LegacyPciRegisters of {self.function!r}, {self.interrupts.kind}>"

    @property
    def loop(self) -> OwnerLoop:
        """See `Registers.loop`."""
        return self._access.loop

    @property
    def memory(self) -> GuestMemory:
        """See `Registers.memory`."""
        return self._access.memory

    @property
    def transport(self) -> str | None:
        """See `Registers.transport`."""
        return "pci"

    @property
    def legacy(self) -> bool:
        """See `Registers.legacy`."""
        return True

    @property
    def findings(self) -> Findings:
        """What the device does against the rules and can be lived with, oldest first."""
        return self.function.findings

    def device_id(self) -> int:
        """See `Registers.device_id`."""
        return self.function.virtio_id

    # --- registers ------------------------------------------------------------------------------------------

    def read(self, name: str) -> int:
        """Read a register of the legacy header."""
        return self._access.read_bar(_BAR, LEGACY[name].offset, LEGACY[name].size)

    def write(self, name: str, value: int) -> None:
        """Write a register of the legacy header."""
        self._access.write_bar(_BAR, LEGACY[name].offset, LEGACY[name].size, value)

    def device_features(self) -> int:
        """See `Registers.device_features`; 32 bits."""
        return self.read("device_features")

    def write_driver_features(self, features: int) -> None:
        """See `Registers.write_driver_features`.

        Raises:
            InvalidArgument: a bit from 32 on: this interface does not reach them.
        """
        if features >> 32:
            raise InvalidArgument(f"features {features:#x}: the legacy interface has bits 0 to 31 (VIRTIO 1.4, 6.3)")
        self.write("driver_features", features)

    def read_status(self) -> int:
        """See `Registers.read_status`."""
        return self.read("device_status")

    def write_status(self, status: int) -> None:
        """See `Registers.write_status`. The configuration change gets its vector just before DRIVER_OK.

        Raises:
            StatusViolation: `VectorRefused`, `VectorMismatch` (4.1.5.1.2.1).
        """
        if status == 0:
            self.interrupts.forget()
        elif status & Status.DRIVER_OK and not status & Status.FAILED:
            self.interrupts.map_config(
                lambda vector: self.write("config_msix_vector", vector), lambda: self.read("config_msix_vector")
            )
        self.write("device_status", status)

    # --- queues ---------------------------------------------------------------------------------------------

    def queue_max_sizes(self) -> list[int]:
        """See `Registers.queue_max_sizes`: up to the last queue that has no eight empty ones in front of it.

        Raises:
            StatusViolation: `BadQueueSize` (2.7): a size that a split queue cannot have.
        """
        sizes: list[int] = []
        for index in range(_MAX_QUEUES):
            self.write("queue_select", index)
            size = self.read("queue_size")
            if size > _MAX_SIZE or size & (size - 1):
                text = f"queue_size is {size}; it is 0, or a power of 2 up to 32768"
                raise StatusViolation("BadQueueSize", "2.7", text, queue=index)
            sizes.append(size)
            if not any(sizes[-_EMPTY_IN_A_ROW:]) and len(sizes) >= _EMPTY_IN_A_ROW:
                break
        while sizes and not sizes[-1]:
            sizes.pop()
        return sizes

    def kick_notifier(self, index: int, position: Callable[[], int]) -> Notifier:  # noqa: ARG002 - no room for it
        """See `Registers.kick_notifier`."""
        return Notifier.callback(lambda: self.write("queue_notify", index))

    def enable_queue(self, config: QueueConfig) -> None:
        """See `Registers.enable_queue`: the address enables it.

        Raises:
            InvalidArgument: the address is no multiple of 4096 or has more than 44 bits, or the areas do not lie as
                4.1.5.1.3.1 says.
            StatusViolation: `QueueEnabledOnReset`, `QueueSizeRefused`, `QueueNotEnabled` (4.1.5.1.3.1),
                `VectorRefused`, `VectorMismatch` (4.1.5.1.2.1).
        """
        index, page = config.index, config.desc // LEGACY_QUEUE_ALIGN
        if config.desc % LEGACY_QUEUE_ALIGN or not 0 < page < 1 << 32:
            text = f"queue {index} lies at {config.desc:#x}; a legacy queue lies at a multiple of 4096 below 2**44"
            raise InvalidArgument(text)
        layout = RingLayout.legacy(config.size, config.desc, align=LEGACY_QUEUE_ALIGN)
        if (config.driver, config.device) != (layout.driver, layout.device):
            text = f"queue {index} has its areas at {config.driver:#x} and {config.device:#x}; the layout of a legacy "
            raise InvalidArgument(text + f"queue puts them at {layout.driver:#x} and {layout.device:#x}")
        self.write("queue_select", index)
        if (size := self.read("queue_size")) != config.size:
            text = f"queue_size is {size}, and was {config.size} when the queue was laid out"
            raise StatusViolation("QueueSizeRefused", "4.1.5.1.3.1", text, queue=index)
        if (before := self.read("queue_address")) != 0:
            text = f"queue_address is {before:#x} before the driver has placed the queue"
            raise StatusViolation("QueueEnabledOnReset", "4.1.5.1.3.1", text, queue=index)
        self.interrupts.map_queue(
            index, lambda vector: self.write("queue_msix_vector", vector), lambda: self.read("queue_msix_vector")
        )
        self.write("queue_address", page)
        if (back := self.read("queue_address")) != page:
            text = f"queue_address {page:#x} was written and {back:#x} reads back"
            raise StatusViolation("QueueNotEnabled", "4.1.5.1.3.1", text, queue=index)

    def reset_queue(self, index: int) -> None:
        """See `Registers.reset_queue`.

        Raises:
            NoFeature: always; the legacy interface has no register for it.
        """
        raise NoFeature(f"queue {index} cannot be reset alone through the legacy interface")

    # --- configuration space --------------------------------------------------------------------------------

    def config_size(self) -> int:
        """See `Registers.config_size`: what is left of the BAR, which may be longer than the space."""
        return max(0, self._size - self._config)

    def config_generation(self) -> int:
        """See `Registers.config_generation`: there is none; `read_config` looks twice instead."""
        return 0

    def read_config(self, offset: int, length: int) -> bytes:
        """See `Registers.read_config`; what takes more than one access is read until two reads agree.

        Raises:
            InvalidArgument: the BAR ends before.
            StatusViolation: `ConfigNeverStable` (2.5).
        """
        self._check_place(offset, length)
        steps = config_steps(offset, length)
        last = self._read_steps(steps)
        if len(steps) < 2:
            return last
        for _ in range(_CONFIG_TRIES):
            again = self._read_steps(steps)
            if again == last:
                return again
            last = again
        text = f"{length} bytes at offset {offset} differed in each of {_CONFIG_TRIES} reads"
        raise StatusViolation("ConfigNeverStable", "2.5", text)

    def _read_steps(self, steps: list[tuple[int, int]]) -> bytes:
        return b"".join(
            self._access.read_bar(_BAR, self._config + at, width).to_bytes(width, "little") for at, width in steps
        )

    def write_config(self, offset: int, data: bytes) -> None:
        """See `Registers.write_config`.

        Raises:
            InvalidArgument: the BAR ends before.
        """
        self._check_place(offset, len(data))
        for at, width in config_steps(offset, len(data)):
            value = int.from_bytes(data[at - offset : at - offset + width], "little")
            self._access.write_bar(_BAR, self._config + at, width, value)

    def _check_place(self, offset: int, length: int) -> None:
        size = self.config_size()
        if offset < 0 or length < 0 or offset + length > size:
            raise InvalidArgument(f"{length} bytes at offset {offset} of a configuration space of {size} bytes")

    def listen(self, *, call: Callable[[int], object], config_changed: Callable[[], object]) -> None:
        """See `Registers.listen`."""
        self.interrupts.listen(call=call, config_changed=config_changed)
