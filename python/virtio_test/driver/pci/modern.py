"""`PciRegisters`: the modern interface of a virtio PCI function, as any driver sees it (VIRTIO 1.4, 4.1.4).

Theory
------
Each register is accessed with the width that it has, 64-bit ones as two halves (4.1.3.1). What the device presents
is judged where it is read: a queue size that cannot be, a notification address outside of its region, a vector or a
size that does not stick. Nothing here waits without a bound, and nothing is done twice that the device could answer
differently the second time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from virtio_test._core import GuestMemory, Notifier, QueueConfig
from virtio_test.clock import Timer
from virtio_test.errors import InvalidArgument, NoFeature, PeerTimeout, StatusViolation
from virtio_test.features import FeatureSet
from virtio_test.loop import OwnerLoop
from virtio_test.spec.pci import COMMON, CapType
from virtio_test.spec.status import Status

from .capabilities import Capabilities, Structure
from .interrupts import Interrupts
from .probe import Findings, PciFunction

__all__ = ["PciRegisters", "config_steps"]

_MAX_SIZE: Final = 32768
_WORD: Final = 0xFFFF_FFFF
_POLL_SECONDS: Final = 0.001
_OPTIONAL: Final = {"NOTIF_CONFIG_DATA": "queue_notif_config_data", "RING_RESET": "queue_reset"}


class PciRegisters:
    """`Registers` over the modern interface; `open_pci` makes it.

    Args:
        function: the function, with its BARs placed and decoded.
        capabilities: what `walk` found; COMMON and NOTIFY are there, ISR as well without MSI-X.
        interrupts: made for this function; None for the line.
        timeout: seconds of the loop's clock that waits take at most.

    Attributes:
        function: the function.
        capabilities: its structures.
        interrupts: which vectors are in use.
    """

    def __init__(
        self,
        function: PciFunction,
        capabilities: Capabilities,
        interrupts: Callable[[Callable[[], int]], Interrupts],
        *,
        timeout: float = 10.0,
    ) -> None:
        self.function = function
        self.capabilities = capabilities
        self._access = function.access
        self._common = capabilities.require(CapType.COMMON_CFG)
        self._notify = capabilities.require(CapType.NOTIFY_CFG)
        self._config = capabilities.structures.get(CapType.DEVICE_CFG)
        self.interrupts = interrupts(self._read_isr)
        self._timeout = timeout
        self._features = FeatureSet()
        self._enabled: set[int] = set()

    def __repr__(self) -> str:
        return f"<PciRegisters of {self.function!r}, {self.interrupts.kind}, queues {sorted(self._enabled)}>"

    # --- what it is -----------------------------------------------------------------------------------------

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
        return False

    @property
    def findings(self) -> Findings:
        """What the device does against the rules and can be lived with, oldest first."""
        return self.function.findings

    @property
    def shared_memory(self) -> dict[int, Structure]:
        """The shared memory regions by id (4.1.4.7)."""
        return dict(self.capabilities.shared_memory)

    def device_id(self) -> int:
        """See `Registers.device_id`."""
        return self.function.virtio_id

    # --- registers ------------------------------------------------------------------------------------------

    def read(self, name: str) -> int:
        """Read a register of the common configuration."""
        register = COMMON[name]
        where = self._common.offset + register.offset
        if register.size < 8:
            return self._access.read_bar(self._common.bar, where, register.size)
        halves = [self._access.read_bar(self._common.bar, where + place, 4) for place in (0, 4)]
        return halves[0] | halves[1] << 32

    def write(self, name: str, value: int) -> None:
        """Write a register of the common configuration; 64 bits as two halves, low first."""
        register = COMMON[name]
        where = self._common.offset + register.offset
        if register.size < 8:
            self._access.write_bar(self._common.bar, where, register.size, value)
        else:
            self._access.write_bar(self._common.bar, where, 4, value & _WORD)
            self._access.write_bar(self._common.bar, where + 4, 4, value >> 32)

    def _read_isr(self) -> int:
        place = self.capabilities.require(CapType.ISR_CFG)
        return self._access.read_bar(place.bar, place.offset, 1)

    def device_features(self) -> int:
        """See `Registers.device_features`; all four words."""
        bits = 0
        for select in range(4):
            self.write("device_feature_select", select)
            bits |= (self.read("device_feature") & _WORD) << 32 * select
        return bits

    def write_driver_features(self, features: int) -> None:
        """See `Registers.write_driver_features`.

        Raises:
            StatusViolation: `CommonTooShort` (4.1.4.3): a feature without its register.
        """
        accepted = FeatureSet.from_bits(features)
        for name, register in _OPTIONAL.items():
            end = COMMON[register].offset + COMMON[register].size
            if name in accepted and end > self._common.length:
                text = f"{name} is offered, but the structure ends at {self._common.length:#x}, before {register}"
                raise StatusViolation("CommonTooShort", "4.1.4.3", text)
        for select in range(4):
            if select < 2 or features >> 64:
                self.write("driver_feature_select", select)
                self.write("driver_feature", features >> 32 * select & _WORD)
        self._features = accepted

    def read_status(self) -> int:
        """See `Registers.read_status`."""
        return self.read("device_status")

    def write_status(self, status: int) -> None:
        """See `Registers.write_status`. The configuration change gets its vector just before DRIVER_OK.

        Raises:
            StatusViolation: `VectorRefused`, `VectorMismatch` (4.1.5.1.2.1).
        """
        if status == 0:
            self._features = FeatureSet()
            self._enabled.clear()
            self.interrupts.forget()
        elif status & Status.DRIVER_OK and not status & Status.FAILED:
            self.interrupts.map_config(
                lambda vector: self.write("config_msix_vector", vector), lambda: self.read("config_msix_vector")
            )
        self.write("device_status", status)

    # --- queues ---------------------------------------------------------------------------------------------

    def queue_max_sizes(self) -> list[int]:
        """See `Registers.queue_max_sizes`. Of a queue that is enabled this is its present size.

        Raises:
            StatusViolation: `BadQueueSize` (4.1.4.3.1).
        """
        return [self._queue_size(index) for index in range(self.read("num_queues"))]

    def _queue_size(self, index: int) -> int:
        self.write("queue_select", index)
        size = self.read("queue_size")
        if size > _MAX_SIZE or (size & (size - 1) and "RING_PACKED" not in self._features):
            text = f"queue_size is {size}; it is 0, or up to 32768 and, without RING_PACKED, a power of 2"
            raise StatusViolation("BadQueueSize", "4.1.4.3.1", text, queue=index)
        return size

    def kick_notifier(self, index: int, position: Callable[[], int]) -> Notifier:
        """See `Registers.kick_notifier`.

        Raises:
            StatusViolation: `NotifyBeyondRegion`, `NotifyMisaligned` (4.1.4.4.1).
        """
        self.write("queue_select", index)
        with_data = "NOTIFICATION_DATA" in self._features
        width = 4 if with_data else 2
        number = self.read("queue_notify_off")
        offset = number * self._notify.multiplier
        if offset + width > self._notify.length:
            text = f"queue_notify_off {number} times {self._notify.multiplier} and {width} bytes reach beyond the "
            text += f"region of {self._notify.length} bytes"
            raise StatusViolation("NotifyBeyondRegion", "4.1.4.4.1", text, queue=index)
        where = self._notify.offset + offset
        if where % width:
            text = f"notifications of {width} bytes go to {where:#x} of BAR {self._notify.bar}"
            raise StatusViolation("NotifyMisaligned", "4.1.4.4.1", text, queue=index)
        value = self.read("queue_notif_config_data") if "NOTIF_CONFIG_DATA" in self._features else index
        access, bar = self._access, self._notify.bar

        def kick() -> None:
            access.write_bar(bar, where, width, value | position() << 16 if with_data else value)

        return Notifier.callback(kick)

    def enable_queue(self, config: QueueConfig) -> None:
        """See `Registers.enable_queue`.

        Raises:
            StatusViolation: `QueueEnabledOnReset`, `QueueNotEnabled` (4.1.4.3.1), `QueueSizeRefused` (4.1.4.3),
                `VectorRefused`, `VectorMismatch` (4.1.5.1.2.1).
        """
        index = config.index
        self.write("queue_select", index)
        if self.read("queue_enable"):
            text = "queue_enable is set before the driver has enabled the queue"
            raise StatusViolation("QueueEnabledOnReset", "4.1.4.3.1", text, queue=index)
        self.write("queue_size", config.size)
        if (size := self.read("queue_size")) != config.size:
            text = f"queue_size {config.size} was written and {size} reads back"
            raise StatusViolation("QueueSizeRefused", "4.1.4.3", text, queue=index)
        self.interrupts.map_queue(
            index, lambda vector: self.write("queue_msix_vector", vector), lambda: self.read("queue_msix_vector")
        )
        self.write("queue_desc", config.desc)
        self.write("queue_driver", config.driver)
        self.write("queue_device", config.device)
        self.write("queue_enable", 1)
        if self.read("queue_enable") != 1:
            text = "queue_enable does not read 1 after it was written"
            raise StatusViolation("QueueNotEnabled", "4.1.4.3.1", text, queue=index)
        self._enabled.add(index)

    def reset_queue(self, index: int) -> None:
        """See `Registers.reset_queue`: the queue is reset once queue_reset reads 0 (4.1.4.3.2).

        Raises:
            NoFeature: RING_RESET was not negotiated.
            InvalidArgument: the queue is not enabled.
            PeerTimeout: queue_reset stays 1.
            StatusViolation: `QueueStillEnabled` (4.1.4.3.1).
        """
        if "RING_RESET" not in self._features:
            raise NoFeature("one queue cannot be reset alone: RING_RESET was not negotiated")
        if index not in self._enabled:
            raise InvalidArgument(f"queue {index} is not enabled; enabled are {sorted(self._enabled)}")
        self.write("queue_select", index)
        self.write("queue_reset", 1)

        def over() -> bool:
            self.write("queue_select", index)
            return self.read("queue_reset") == 0

        self._wait(over, f"the end of the reset of queue {index}")
        if self.read("queue_enable"):
            raise StatusViolation("QueueStillEnabled", "4.1.4.3.1", "queue_enable is set after the reset", queue=index)
        self._enabled.discard(index)
        self.interrupts.forget_queue(index)

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        if condition():
            return
        # A register that changes wakes nobody, so a timer makes the loop look.
        poll = Timer(self.loop.clock, lambda: None, first_after=_POLL_SECONDS, every=_POLL_SECONDS)
        try:
            if not self.loop.run(until=condition, timeout=self._timeout):
                raise PeerTimeout(f"{what} did not come within {self._timeout:g} s")
        finally:
            poll.stop()

    # --- configuration space --------------------------------------------------------------------------------

    def config_size(self) -> int:
        """See `Registers.config_size`: the length of the DEVICE region, which may be longer than the space."""
        return 0 if self._config is None else self._config.length

    def config_generation(self) -> int:
        """See `Registers.config_generation`; 8 bits."""
        return self.read("config_generation")

    def read_config(self, offset: int, length: int) -> bytes:
        """See `Registers.read_config`.

        Raises:
            InvalidArgument: the region ends before.
        """
        return b"".join(
            self._access.read_bar(bar, where, width).to_bytes(width, "little")
            for bar, where, width in self._config_accesses(offset, length)
        )

    def write_config(self, offset: int, data: bytes) -> None:
        """See `Registers.write_config`.

        Raises:
            InvalidArgument: the region ends before.
        """
        done = 0
        for bar, where, width in self._config_accesses(offset, len(data)):
            self._access.write_bar(bar, where, width, int.from_bytes(data[done : done + width], "little"))
            done += width

    def _config_accesses(self, offset: int, length: int) -> list[tuple[int, int, int]]:
        size = self.config_size()
        if offset < 0 or length < 0 or offset + length > size:
            raise InvalidArgument(f"{length} bytes at offset {offset} of a configuration space of {size} bytes")
        if self._config is None:
            return []
        return [(self._config.bar, self._config.offset + at, width) for at, width in config_steps(offset, length)]

    def listen(self, *, call: Callable[[int], object], config_changed: Callable[[], object]) -> None:
        """See `Registers.listen`."""
        self.interrupts.listen(call=call, config_changed=config_changed)


def config_steps(offset: int, length: int) -> list[tuple[int, int]]:
    """Accesses for `length` bytes of a configuration space: (offset, width).

    What has the size and alignment of an integer field is accessed as one, 64 bits as two halves (4.1.3.1);
    all else is bytes.
    """
    width = {2: 2, 4: 4, 8: 4}.get(length, 1)
    if offset % width:
        width = 1
    return [(at, width) for at in range(offset, offset + length, width)]
