"""The vfio-user client: the other end, enough of it that our driver model drives any vfio-user device.

Theory
------
The client is the bus (`driver.access.PciAccess`) between a driver and a device in another process. It calls and
waits: each access is a command and its reply, within `timeout`. While it waits, and while it is idle, it serves
the device's accesses to memory that it has not shared.

Nothing that the server sends is trusted: replies must fit their commands, and accesses to memory must lie in what
was exported, or they are refused.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import Final, Self, TypeVar

from virtio_test._core import GuestMemory
from virtio_test.errors import InvalidArgument, MessageError, PeerDisconnected, PeerTimeout, StateError
from virtio_test.loop import OwnerLoop
from virtio_test.sockets.reach import reach
from virtio_test.spec import pcibus

from .capabilities import Capabilities, pack_capabilities, parse_capabilities
from .codec import Message, encode, encode_error, encode_reply
from .messages import COMMANDS, MAJOR, MAX_FDS, MINOR, Command, IrqIndex, IrqSet, RegionIndex
from .payloads import (
    MAX_DATA,
    DeviceInfo,
    DmaAccess,
    DmaData,
    DmaMap,
    DmaUnmap,
    DmaWritten,
    IrqInfo,
    Payload,
    RegionAccess,
    RegionData,
    RegionInfo,
    SetIrqs,
    Version,
)
from .rules import violation
from .vectors import ClientInterrupts, MsixPlace
from .wire import Wire

__all__ = ["VfioUserClient"]

_log: Final = logging.getLogger("virtio_test.vfio_user")
_P = TypeVar("_P", bound=Payload)
_MEMORY_SIZE: Final = 16 << 20
_WINDOWS: Final = {"memory": (0xE000_0000, 0xFEC0_0000), "io": (0x1000, 0x1_0000), "high": (1 << 36, 1 << 46)}
_MESSAGE_ADDRESS: Final = 0xFEE0_0000
_CONFIG: Final = RegionIndex.CONFIG


class VfioUserClient:
    """A client of a vfio-user server; it is a `PciAccess`.

    Args:
        path: where the server listens; or
        connection: a connected UNIX stream socket, from now on this object's.
        loop: where interrupts arrive and the device's memory accesses are served; a new one when None.
        memory: the guest's memory; 16 MiB at address 0 when None. All its regions are exported.
        share: send its files along; without them the device must ask for each byte.
        posted: write to BARs without waiting for an answer, as QEMU does.
        transfer: bytes that the device may ask for in one message, at most 1 MiB.
        timeout: seconds that the server may take for an answer.

    Attributes:
        capabilities: what the server can do.
        info: its device.
        regions: its regions, by index.
        irqs: its types of interrupt, by index.
        msix: where it says that its MSI-X table is, or None.
        interrupts: how its interrupts are heard.
        served: accesses to memory that the device has asked for.
        serve: answers them; `serve_memory`, unless a test has other plans.

    Raises:
        InvalidArgument: neither or both of path and connection, or an impossible transfer size.
        OSError: nobody listens there, or others wait there already.
        PeerDisconnected, PeerTimeout, MessageError: the server ends the connection, is silent, or breaks a rule.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        connection: socket.socket | None = None,
        loop: OwnerLoop | None = None,
        memory: GuestMemory | None = None,
        share: bool = True,
        posted: bool = True,
        transfer: int = MAX_DATA,
        timeout: float = 5.0,
    ) -> None:
        if not 1 <= transfer <= MAX_DATA:
            raise InvalidArgument(f"transfers of {transfer} bytes: 1 to {MAX_DATA} are possible")
        if (path is None) == (connection is None):
            raise InvalidArgument("a client needs either a socket path or a connection")
        if connection is None:
            connection = reach(path or "", timeout=timeout)
        self._loop = OwnerLoop() if loop is None else loop
        self._memory = GuestMemory([(0, _MEMORY_SIZE)]) if memory is None else memory
        self._wire = Wire(connection, "client")
        self._posted = posted
        self._transfer = transfer
        self._timeout = timeout
        self._number = 0
        self._waiting: dict[int, Message | None] = {}
        self._exports: dict[int, tuple[int, bool]] = {}
        self._free = {name: low for name, (low, _) in _WINDOWS.items()}
        self._placed: dict[int, int] = {}
        self.interrupts: ClientInterrupts | None = None
        self.msix: MsixPlace | None = None
        self.capabilities = Capabilities()
        self.info = DeviceInfo(0)
        self.regions: dict[int, RegionInfo] = {}
        self.irqs: dict[int, IrqInfo] = {}
        self.served = 0
        self.serve: Callable[[Message], object] = self.serve_memory
        self._loop.add_reader(self._wire.fileno(), self._readable)
        try:
            self._open(share=share)
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"<VfioUserClient, {'closed' if self._wire.closed else 'connected'}, {len(self._exports)} regions>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, *, share: bool) -> None:
        ours = Capabilities(
            max_msg_fds=MAX_FDS,
            max_data_xfer_size=self._transfer,
            named=frozenset({"max_msg_fds", "max_data_xfer_size", "max_dma_maps", "pgsizes", "write_multiple"}),
            write_multiple=True,
        )
        found = self.request(Command.VERSION, Version(MAJOR, MINOR, pack_capabilities(ours)), Version)
        if found.major != MAJOR or found.minor > MINOR:
            raise violation("VersionMajor", f"version {found.major}.{found.minor} answers {MAJOR}.{MINOR}")
        self.capabilities = parse_capabilities(found.data)
        for region in self._memory.regions:
            self.export(
                region.address,
                region.size,
                fd=region.fd if share else None,
                offset=region.offset if share else 0,
                writable=region.writable,
            )
        self.info = self.request(Command.DEVICE_GET_INFO, DeviceInfo(DeviceInfo.sizes()[0]), DeviceInfo)
        for index in range(min(self.info.num_regions, len(RegionIndex))):
            asked = RegionInfo(RegionInfo.sizes()[0], 0, index)
            self.regions[index] = self.request(Command.DEVICE_GET_REGION_INFO, asked, RegionInfo)
        for index in range(min(self.info.num_irqs, len(IrqIndex))):
            asked = IrqInfo(IrqInfo.sizes()[0], 0, index)
            self.irqs[index] = self.request(Command.DEVICE_GET_IRQ_INFO, asked, IrqInfo)
        self.msix = MsixPlace.find(self.read_config)
        self.interrupts = ClientInterrupts(
            self._loop,
            self.msix,
            set_irqs=self.set_irqs,
            counts={index: each.count for index, each in self.irqs.items()},
        )

    # --- commands -------------------------------------------------------------------------------------------

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send bytes as they are, with `fds` beside the first of them."""
        self._wire.send(data, fds)

    def command(
        self, command: int, payload: Payload | None = None, *, fds: Sequence[int] = (), no_reply: bool = False
    ) -> Message | None:
        """Send a command and wait for its reply, which may say that it failed; None with `no_reply`.

        Raises:
            PeerDisconnected, PeerTimeout: there is no reply.
            MessageError: the server sends what it may not.
        """
        if self._wire.closed:
            raise PeerDisconnected("the server has closed the connection")
        self._number = (self._number + 1) & 0xFFFF
        number = self._number
        self._say(encode(command, number, payload, no_reply=no_reply), fds)
        if no_reply:
            return None
        self._waiting[number] = None
        try:
            return self._wait(command, number)
        finally:
            del self._waiting[number]

    def _say(self, data: bytes, fds: Sequence[int] = ()) -> None:
        try:
            self._wire.send(data, fds)
        except MessageError:
            # Half a message may be out, and nothing can follow it.
            self._wire.closed = True
            raise

    def request(self, command: Command, payload: Payload | None, kind: type[_P], *, fds: Sequence[int] = ()) -> _P:
        """Send a command that must succeed; the payload of its reply.

        Raises:
            PeerDisconnected, PeerTimeout, MessageError: see `command`; CommandRefused, the server refuses it.
        """
        reply = self.command(command, payload, fds=fds)
        assert reply is not None
        reply.close()
        if reply.errno is not None or not isinstance(reply.payload, kind):
            name = errno.errorcode.get(reply.errno or 0, str(reply.errno))
            raise violation("CommandRefused", f"{command.name} {payload} was answered with {name}")
        return reply.payload

    def _wait(self, command: int, number: int) -> Message:
        end = time.monotonic() + self._timeout
        while True:
            left = end - time.monotonic()
            if left <= 0 or not self._wire.wait(left):
                # A reply that comes after all would answer the next command.
                self._wire.closed = True
                raise PeerTimeout(f"no reply to {_name(command)} in {self._timeout:g} s")
            for message in self._receive():
                if not message.reply:
                    self.serve(message)
                elif message.id in self._waiting:
                    self._waiting[message.id] = message
                else:
                    self._wire.closed = True
                    raise violation("UnexpectedReply", f"a reply to {message.name} with id {message.id}")
            # It may have come while an access to memory was served.
            reply = self._waiting[number]
            if reply is not None:
                if reply.command != command:
                    self._wire.closed = True
                    raise violation("UnexpectedReply", f"{reply.name} answers {_name(command)}")
                return reply
            if self._wire.closed:
                raise PeerDisconnected(f"the server has closed the connection instead of answering {_name(command)}")

    def _receive(self) -> list[Message]:
        try:
            messages = self._wire.receive()
        except MessageError:
            self._wire.closed = True
            raise
        return messages or []

    def _readable(self) -> None:
        """The device asks for memory while nobody waits for it, or it has gone."""
        try:
            for message in self._receive():
                if message.reply:
                    _log.warning("a reply to %s, which nobody waits for", message.name)
                    self._wire.closed = True
                else:
                    self.serve(message)
        except MessageError as error:
            _log.warning("the server broke the rules: %s", error)
        if self._wire.closed:
            self._loop.remove_reader(self._wire.fileno())

    # --- memory ---------------------------------------------------------------------------------------------

    def export(self, address: int, size: int, *, fd: int | None = None, offset: int = 0, writable: bool = True) -> None:
        """Let the device reach a range of the memory, through `fd` or by messages."""
        asked = DmaMap(DmaMap.sizes()[0], 3 if writable else 1, offset, address, size)
        # Before the reply: the device may ask at once.
        self._exports[address] = size, writable
        try:
            self.request(Command.DMA_MAP, asked, Payload, fds=() if fd is None else (fd,))
        except MessageError:
            del self._exports[address]
            raise

    def withdraw(self, address: int, size: int) -> None:
        """Take a range back; when this returns, the device does not use it any more."""
        self.request(Command.DMA_UNMAP, DmaUnmap(DmaUnmap.sizes()[0], 0, address, size), DmaUnmap)
        for start, (length, _) in list(self._exports.items()):
            if address <= start and start + length <= address + size:
                del self._exports[start]

    def _exported(self, address: int, count: int, *, write: bool) -> bool:
        return 1 <= count <= self._transfer and any(
            start <= address and address + count <= start + size and (writable or not write)
            for start, (size, writable) in self._exports.items()
        )

    def serve_memory(self, message: Message) -> None:
        """Answer an access of the device to memory, which may lie in what was exported only."""
        self.served += 1
        reply: Payload | None = None
        asked = message.payload
        try:
            if isinstance(asked, DmaAccess) and self._exported(asked.address, asked.count, write=False):
                data = self._memory.read(asked.address, asked.count)
                reply = DmaData(asked.address, asked.count, data)
            elif (
                isinstance(asked, DmaData)
                and len(asked.data) == asked.count
                and self._exported(asked.address, asked.count, write=True)
            ):
                self._memory.write(asked.address, asked.data)
                reply = DmaWritten(asked.address, asked.count)
        except InvalidArgument as error:
            _log.warning("exported memory is not there: %s", error)
        if message.no_reply:
            return
        if reply is not None:
            self._say(encode_reply(message.command, message.id, reply))
        else:
            known = message.command in (Command.DMA_READ, Command.DMA_WRITE)
            self._say(encode_error(message.command, message.id, errno.EFAULT if known else errno.ENOSYS))

    # --- the bus --------------------------------------------------------------------------------------------

    @property
    def loop(self) -> OwnerLoop:
        """See `PciAccess.loop`."""
        return self._loop

    @property
    def memory(self) -> GuestMemory:
        """See `PciAccess.memory`."""
        return self._memory

    def _read(self, region: int, offset: int, size: int) -> int:
        reply = self.command(Command.REGION_READ, RegionAccess(offset, region, size))
        assert reply is not None
        if reply.errno is not None:
            # As on a bus where nobody answers.
            return (1 << 8 * size) - 1
        got = reply.payload
        if not isinstance(got, RegionData) or (got.offset, got.region, got.count, len(got.data)) != (
            offset,
            region,
            size,
            size,
        ):
            # Not its data: that may be a MiB.
            what = (
                f"{len(got.data)} bytes of {got.count} at {got.offset:#x}" if isinstance(got, RegionData) else "nothing"
            )
            raise violation("ReplyData", f"{what} answers a read of {size} bytes at {offset:#x} of region {region}")
        return int.from_bytes(got.data, "little")

    def _write(self, region: int, offset: int, data: bytes, *, posted: bool) -> None:
        self.command(Command.REGION_WRITE, RegionData(offset, region, len(data), data), no_reply=posted)

    def read_config(self, offset: int, size: int) -> int:
        """See `PciAccess.read_config`."""
        if offset + size > self._size(_CONFIG):
            return (1 << 8 * size) - 1
        return self._read(_CONFIG, offset, size)

    def write_config(self, offset: int, size: int, value: int) -> None:
        """See `PciAccess.write_config`."""
        if offset + size > self._size(_CONFIG):
            return
        self._write(_CONFIG, offset, _bytes(value, size), posted=False)
        if self.msix is not None and self.interrupts is not None:
            control = self.msix.position + pcibus.MSIX_CONTROL
            if offset < control + 2 and control < offset + size:
                self.interrupts.control(self.read_config(control, 2))

    def _size(self, region: int) -> int:
        found = self.regions.get(region)
        return 0 if found is None else found.size

    def place_bar(self, bar: int, size: int, *, io: bool) -> int:
        """See `PciAccess.place_bar`; the server sees the address in the BAR's register and nowhere else.

        Raises:
            InvalidArgument: a size that is no power of two, or no such BAR.
            StateError: the bus has no room.
        """
        if not 0 <= bar <= 5 or size < 4 or size & (size - 1):
            raise InvalidArgument(f"BAR {bar} of {size} bytes: BARs 0 to 5 are there, with powers of two from 4 on")
        if bar in self._placed:
            return self._placed[bar]
        for name in ("io",) if io else ("memory", "high"):
            address = (self._free[name] + size - 1) & -size
            if address + size <= _WINDOWS[name][1]:
                self._free[name] = address + size
                self._placed[bar] = address
                return address
        raise StateError(f"no room for BAR {bar} with {size} bytes of {'I/O' if io else 'memory'} space")

    def read_bar(self, bar: int, offset: int, size: int) -> int:
        """See `PciAccess.read_bar`."""
        return self._read(bar, offset, size)

    def write_bar(self, bar: int, offset: int, size: int, value: int) -> None:
        """See `PciAccess.write_bar`."""
        data = _bytes(value, size)
        self._write(bar, offset, data, posted=self._posted)
        if self.interrupts is not None:
            self.interrupts.written(bar, offset, data)

    def reset(self) -> None:
        """Reset the device."""
        self.request(Command.DEVICE_RESET, None, Payload)
        if self.interrupts is not None:
            self.interrupts.forget()
            self.interrupts.control(0)

    # --- interrupts -----------------------------------------------------------------------------------------

    def message(self, vector: int) -> tuple[int, int]:
        """See `PciAccess.message`: the device does not look at it, but a driver reads it back.

        Raises:
            StateError: the device has no such vector.
        """
        vectors = 0 if self.interrupts is None else self.interrupts.vectors
        if not 0 <= vector < vectors:
            raise StateError(f"no message for vector {vector}: there are {vectors}")
        return _MESSAGE_ADDRESS, vector

    def listen(self, *, message: Callable[[int], object], line: Callable[[], object]) -> None:
        """See `PciAccess.listen`."""
        if self.interrupts is not None:
            self.interrupts.listen(message=message, line=line)

    def set_irqs(
        self, index: int, flags: IrqSet, start: int, count: int, fds: Sequence[int] = (), *, data: bytes = b""
    ) -> None:
        """DEVICE_SET_IRQS, in as many messages as the fds need.

        Raises:
            MessageError: CommandRefused.
        """
        step = max(1, min(MAX_FDS, self.capabilities.max_msg_fds)) if fds else max(1, count)
        for at in range(0, max(1, count), step):
            part = list(fds[at : at + step])
            asked = SetIrqs(SetIrqs.sizes()[0], flags, index, start + at, len(part) or count, data)
            self.request(Command.DEVICE_SET_IRQS, asked, Payload, fds=part)

    def close(self) -> None:
        """Close the connection, and all fds of this client."""
        self._loop.remove_reader(self._wire.fileno())
        if self.interrupts is not None:
            self.interrupts.close()
        self._wire.close()


def _bytes(value: int, size: int) -> bytes:
    if size not in (1, 2, 4, 8) or not 0 <= value < 1 << 8 * size:
        raise InvalidArgument(f"{value:#x} does not fit into an access of {size} bytes")
    return value.to_bytes(size, "little")


def _name(command: int) -> str:
    row = COMMANDS.get(command)
    return f"command {command}" if row is None else row.name
