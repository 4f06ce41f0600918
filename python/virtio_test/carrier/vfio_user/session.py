"""One client's session: what its commands do to the PCI function; no socket is touched here.

Theory
------
`handle` takes a decoded command and gives an `Answer`: the bytes of the reply, and what is to be done once they
are sent. Writes to a region are answered *first*: a client such as QEMU holds its big lock while it waits for
that reply, and could not serve the memory accesses that the write sets in motion. Nobody can see the difference,
because commands are worked on in order.

A command that cannot be honoured changes nothing and is answered with an errno. Its sender could not learn of it
if it set No_reply; then the connection ends.

**Memory that moves.** QEMU takes RAM away and brings it back in another shape within one change of its memory
map, as a burst of DMA_UNMAP and DMA_MAP. In between a ring may lie nowhere. So the first DMA_UNMAP makes the
function hold, and the first command of another kind, or 50 ms of silence, makes it go on.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from typing import Final, NamedTuple

from virtio_test.clock import Timer
from virtio_test.errors import MessageError
from virtio_test.transport.pci.interface import PciEndpoint

from .capabilities import Capabilities, pack_capabilities, parse_capabilities
from .codec import Message, encode_error, encode_reply
from .dma import MAX_MAPS, DmaTable, Port
from .irqs import Interrupts
from .messages import MAJOR, MAX_FDS, MINOR, Command, RegionIndex
from .payloads import (
    MAX_DATA,
    DeviceInfo,
    DmaMap,
    DmaUnmap,
    IrqInfo,
    Payload,
    RegionAccess,
    RegionData,
    RegionInfo,
    RegionIoFds,
    SetIrqs,
    Version,
    WriteCount,
    WriteMulti,
)
from .rules import Refused, violation

__all__ = ["MOVES", "Answer", "Session"]

_log: Final = logging.getLogger("virtio_test.vfio_user")

_C = Command
_PROMPT: Final = frozenset(
    {
        _C.DEVICE_GET_INFO,
        _C.DEVICE_GET_REGION_INFO,
        _C.DEVICE_GET_REGION_IO_FDS,
        _C.DEVICE_GET_IRQ_INFO,
        _C.DEVICE_SET_IRQS,
        _C.REGION_READ,
    }
)
"""Commands that touch neither queues nor guest memory."""

MOVES: Final = frozenset({_C.DMA_MAP, _C.DMA_UNMAP})
"""Commands that move memory: inside of an access they can be answered, and are done to guest memory after it."""

_HOLD_SECONDS: Final = 0.05
_LOGGED_REFUSALS: Final = 20
_DEVICE_FLAGS: Final = 3  # can be reset, is PCI
_REGION_FLAGS: Final = 3  # read, write; never mmap: every access must be seen
_REGIONS: Final = len(RegionIndex)
_PAGE: Final = 4096


class Answer(NamedTuple):
    """What a command leads to.

    Attributes:
        reply: bytes to send, if any.
        then: what to do after that, if anything.
    """

    reply: bytes | None
    then: Callable[[], None] | None = None


class Session:
    """The state between the connecting and the leaving of one client.

    Args:
        endpoint: the PCI function.
        port: reaches memory that the client does not share.

    Attributes:
        dma: the client's memory.
        interrupts: where the function's interrupts go.
        client: what the client can do; None before its VERSION.
    """

    def __init__(self, endpoint: PciEndpoint, port: Port) -> None:
        self.endpoint = endpoint
        self.dma = DmaTable(endpoint.memory, port)
        self.interrupts = Interrupts(endpoint.loop, vectors=endpoint.vectors, has_line=endpoint.has_line)
        self.client: Capabilities | None = None
        self._sizes = {bar.index: bar.size for bar in endpoint.bars} | {int(RegionIndex.CONFIG): endpoint.config_size}
        self._held: Timer | None = None
        self._inside = False
        self._refusals = 0
        self._handlers: dict[int, Callable[[Message], Payload | None]] = {
            _C.VERSION: self._version,
            _C.DMA_MAP: self._dma_map,
            _C.DMA_UNMAP: self._dma_unmap,
            _C.DEVICE_GET_INFO: self._get_info,
            _C.DEVICE_GET_REGION_INFO: self._get_region_info,
            _C.DEVICE_GET_REGION_IO_FDS: self._get_region_io_fds,
            _C.DEVICE_GET_IRQ_INFO: self._get_irq_info,
            _C.DEVICE_SET_IRQS: self._set_irqs,
            _C.REGION_READ: self._region_read,
            _C.DEVICE_RESET: self._reset,
        }
        self._writers: dict[int, Callable[[Message], tuple[Payload, Callable[[], None]]]] = {
            _C.REGION_WRITE: self._region_write,
            _C.REGION_WRITE_MULTI: self._region_write_multi,
        }
        endpoint.external_table = True
        endpoint.connect(self.interrupts)

    def __repr__(self) -> str:
        return f"<Session {self.dma}, {self.interrupts}>"

    # --- commands -------------------------------------------------------------------------------------------

    def handle(self, message: Message, *, inside: bool = False) -> Answer:
        """Do what `message` asks, as far as its answer depends on it.

        Args:
            message: a command.
            inside: the device is in the middle of something, so a hold goes on, and `MOVES` change only what is
                answered; what the answer wants done changes guest memory.

        Raises:
            MessageError: the connection must end.
        """
        if (message.command == _C.VERSION) != (self.client is None):
            raise violation(
                "VersionFirst",
                "VERSION came again" if self.client else f"{message.name} came before VERSION",
            )
        if message.command not in MOVES and not inside:
            self._release()
        then: Callable[[], None] | None = None
        self._inside = inside
        try:
            writer = self._writers.get(message.command)
            if writer is not None:
                payload, then = writer(message)
            else:
                payload = self._handler(message)(message)
                then = self.settle if inside and message.command in MOVES else None
        except Refused as refused:
            if message.no_reply:
                raise refused.error from None
            self._refusals += 1
            if self._refusals <= _LOGGED_REFUSALS:
                _log.warning("answered with %s: %s", errno.errorcode.get(refused.errno), refused.error)
            return Answer(encode_error(message.command, message.id, refused.errno))
        return Answer(None if message.no_reply else encode_reply(message.command, message.id, payload), then)

    def is_prompt(self, message: Message) -> bool:
        """Whether `message` touches neither queues nor guest memory, so that it can be served inside of an access."""
        asked = message.payload
        if isinstance(asked, RegionData):
            return self._is_notification(asked.region, asked.offset, asked.count)
        if isinstance(asked, WriteMulti):
            return all(self._is_notification(one.region, one.offset, one.count) for one in asked.writes)
        return message.command in _PROMPT

    def _is_notification(self, region: int, offset: int, count: int) -> bool:
        return region < RegionIndex.ROM and self.endpoint.is_notification(region, offset, count)

    def _handler(self, message: Message) -> Callable[[Message], Payload | None]:
        handler = self._handlers.get(message.command)
        if handler is not None:
            return handler
        if message.command == _C.DEVICE_FEATURE:
            raise Refused(errno.ENOTTY, "NotSupported", "device features are not served: there is no migration")
        if message.command in (_C.MIG_DATA_READ, _C.MIG_DATA_WRITE):
            raise Refused(errno.ENOTSUP, "NotSupported", f"{message.name} is not served: there is no migration")
        raise Refused(errno.ENOSYS, "UnknownCommand", f"{message.name} is not known")

    def _version(self, message: Message) -> Payload:
        asked = message.payload
        assert isinstance(asked, Version)
        if asked.major != MAJOR:
            raise violation("VersionMajor", f"version {asked.major}.{asked.minor}")
        client = parse_capabilities(asked.data)
        ours = Capabilities(
            max_msg_fds=MAX_FDS,
            max_data_xfer_size=MAX_DATA,
            max_dma_maps=min(client.max_dma_maps, MAX_MAPS),
            pgsizes=_PAGE,
            write_multiple=client.write_multiple,
            named=client.named,
        )
        self.client = client
        return Version(MAJOR, min(asked.minor, MINOR), pack_capabilities(ours))

    # --- memory ---------------------------------------------------------------------------------------------

    def _dma_map(self, message: Message) -> None:
        assert isinstance(message.payload, DmaMap)
        self.dma.map(message.payload, message.fds[0] if message.fds else None, later=self._inside)

    def _dma_unmap(self, message: Message) -> Payload:
        assert isinstance(message.payload, DmaUnmap)
        if not self._inside:
            self._hold()
        self.dma.unmap(message.payload, later=self._inside)
        return message.payload

    def settle(self) -> None:
        """Do to guest memory what was answered inside of an access.

        Raises:
            MessageError: it cannot be done, and the client believes that it was.
        """
        self._hold()
        try:
            self.dma.settle()
        except Refused as refused:
            raise refused.error from None

    def _hold(self) -> None:
        if self._held is None:
            self.endpoint.hold()
        else:
            self._held.stop()
        self._held = Timer(self.endpoint.loop.clock, self._release, first_after=_HOLD_SECONDS)

    def _release(self) -> None:
        if self._held is not None:
            self._held.stop()
            self._held = None
            self.endpoint.release()

    # --- what there is --------------------------------------------------------------------------------------

    def _get_info(self, message: Message) -> Payload:
        assert isinstance(message.payload, DeviceInfo)
        size = _room(message.payload.argsz, DeviceInfo)
        return DeviceInfo(size, _DEVICE_FLAGS, _REGIONS, self.interrupts.types)

    def _size(self, index: int) -> int:
        """Bytes of a region; 0 for one that the protocol knows and the function does not have."""
        if index >= _REGIONS:
            raise Refused(errno.EINVAL, "RegionIndex", f"region {index} of {_REGIONS}")
        return self._sizes.get(index, 0)

    def _get_region_info(self, message: Message) -> Payload:
        asked = message.payload
        assert isinstance(asked, RegionInfo)
        size = self._size(asked.index)
        return RegionInfo(_room(asked.argsz, RegionInfo), _REGION_FLAGS if size else 0, asked.index, size=size)

    def _get_region_io_fds(self, message: Message) -> Payload:
        asked = message.payload
        assert isinstance(asked, RegionIoFds)
        self._size(asked.index)
        return RegionIoFds(_room(asked.argsz, RegionIoFds), 0, asked.index)

    def _get_irq_info(self, message: Message) -> Payload:
        assert isinstance(message.payload, IrqInfo)
        _room(message.payload.argsz, IrqInfo)
        return self.interrupts.info(message.payload.index)

    def _set_irqs(self, message: Message) -> None:
        assert isinstance(message.payload, SetIrqs)
        self.interrupts.set(message.payload, message.fds)

    # --- accesses -------------------------------------------------------------------------------------------

    def _check_range(self, region: int, offset: int, count: int) -> None:
        size = self._size(region)
        if not 1 <= count <= MAX_DATA:
            raise Refused(errno.EINVAL, "TransferSize", f"an access of {count} bytes")
        if offset + count > size:
            raise Refused(
                errno.EINVAL, "RegionRange", f"{count} bytes at {offset:#x} of region {region}, which has {size:#x}"
            )

    def _region_read(self, message: Message) -> Payload:
        asked = message.payload
        assert isinstance(asked, RegionAccess)
        self._check_range(asked.region, asked.offset, asked.count)
        if asked.region == RegionIndex.CONFIG:
            data = self.endpoint.read_config(asked.offset, asked.count)
        else:
            data = self.endpoint.read_bar(asked.region, asked.offset, asked.count)
        return RegionData(asked.offset, asked.region, asked.count, data)

    def _write(self, region: int, offset: int, data: bytes) -> None:
        if region == RegionIndex.CONFIG:
            self.endpoint.write_config(offset, data)
        else:
            self.endpoint.write_bar(region, offset, data)

    def _region_write(self, message: Message) -> tuple[Payload, Callable[[], None]]:
        asked = message.payload
        assert isinstance(asked, RegionData)
        self._check_range(asked.region, asked.offset, asked.count)
        if len(asked.data) != asked.count:
            raise Refused(errno.EINVAL, "TransferSize", f"{len(asked.data)} bytes of data for {asked.count}")
        reply = RegionAccess(asked.offset, asked.region, asked.count)
        return reply, lambda: self._write(asked.region, asked.offset, asked.data)

    def _region_write_multi(self, message: Message) -> tuple[Payload, Callable[[], None]]:
        asked = message.payload
        assert isinstance(asked, WriteMulti)
        for one in asked.writes:
            self._check_range(one.region, one.offset, one.count)
            if one.count > len(one.data):
                raise Refused(errno.EINVAL, "WriteMulti", f"one of its writes has {one.count} bytes")

        def write() -> None:
            for one in asked.writes:
                self._write(one.region, one.offset, one.data[: one.count])

        return WriteCount(len(asked.writes)), write

    def _reset(self, _: Message) -> None:
        self.endpoint.reset()

    # --- outside of commands --------------------------------------------------------------------------------

    def close(self) -> None:
        """The client has gone: the function is as before it came, and nothing of the client's is left."""
        if self._held is not None:
            self._held.stop()
        else:
            self.endpoint.hold()
        try:
            self.endpoint.connect(None)
            self.endpoint.reset()
        finally:
            self._held = None
            self.interrupts.close()
            self.dma.clear()
            self.endpoint.external_table = False
            self.endpoint.release()


def _room(argsz: int, kind: type[Payload]) -> int:
    """The size of a reply, for which the client must have room."""
    size = kind.sizes()[0]
    if argsz < size:
        raise Refused(errno.EINVAL, "ArgumentSize", f"argsz {argsz}, where {size} are needed")
    return size


def failed(error: Exception) -> MessageError:
    """The error for an exception of the device's own code, which a command has reached."""
    return violation("DeviceFailed", f"{type(error).__name__}: {error}")
