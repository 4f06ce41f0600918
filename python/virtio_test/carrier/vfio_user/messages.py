"""The one table of the vfio-user protocol: every command, both ways, with all that is fixed about it.

Theory
------
A message is a header of 16 bytes (id, command, size of the whole, flags, errno) and a payload; file descriptors
travel beside it. A row says for one command: its number, which side sends it, what it and its reply carry, and
how many fds come with either. Codec, server, client, documentation (`render`) and tests read the same rows.

Every command is answered, with a payload or with an errno, unless its sender sets No_reply.

Source: QEMU, docs/interop/vfio-user.rst, the state of QEMU 11.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from types import MappingProxyType
from typing import Final

from . import payloads as p

__all__ = [
    "COMMANDS",
    "HEADER_BYTES",
    "MAJOR",
    "MAX_FDS",
    "MAX_MESSAGE",
    "MINOR",
    "Command",
    "Flag",
    "IrqIndex",
    "IrqSet",
    "RegionIndex",
    "Row",
    "render",
]

MAJOR: Final = 0
MINOR: Final = 0
HEADER_BYTES: Final = 16
MAX_FDS: Final = 16
"""fds of one message: what we name as max_msg_fds, and the most that QEMU agrees to."""
MAX_MESSAGE: Final = HEADER_BYTES + 16 + p.MAX_DATA


class Flag(IntFlag):
    """The flags of a header; bits 0 to 3 are the type, of which 0 and 1 are defined."""

    REPLY = 0x1
    NO_REPLY = 0x10
    ERROR = 0x20


class Command(IntEnum):
    """What one side asks of the other."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_REGION_IO_FDS = 6
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    DEVICE_RESET = 13
    REGION_WRITE_MULTI = 15
    DEVICE_FEATURE = 16
    MIG_DATA_READ = 17
    MIG_DATA_WRITE = 18


class RegionIndex(IntEnum):
    """The regions of a PCI device."""

    BAR0 = 0
    BAR1 = 1
    BAR2 = 2
    BAR3 = 3
    BAR4 = 4
    BAR5 = 5
    ROM = 6
    CONFIG = 7
    VGA = 8


class IrqIndex(IntEnum):
    """The types of interrupt of a PCI device."""

    INTX = 0
    MSI = 1
    MSIX = 2
    ERR = 3
    REQ = 4


class IrqSet(IntFlag):
    """The flags of DEVICE_SET_IRQS: one of the data, one of the actions."""

    DATA_NONE = 1
    DATA_BOOL = 2
    DATA_EVENTFD = 4
    MASK = 8
    UNMASK = 16
    TRIGGER = 32


@dataclass(frozen=True, kw_only=True)
class Row:
    """One command of the protocol.

    Attributes:
        command: its number and name.
        payload: what the command carries.
        reply: what its reply carries, unless that says that the command failed.
        from_server: whether it is the server that sends it.
        fds: least and largest number of fds with the command.
        reply_fds: the same with the reply.
        fd_counts: the numbers of fds that this payload allows; None when `fds` says all.
    """

    command: Command
    payload: type[p.Payload] = p.Empty
    reply: type[p.Payload] = p.Empty
    from_server: bool = False
    fds: tuple[int, int] = (0, 0)
    reply_fds: tuple[int, int] = (0, 0)
    fd_counts: Callable[[p.Payload], tuple[int, ...]] | None = None

    @property
    def name(self) -> str:
        """The name of the command."""
        return self.command.name


def _irq_fds(payload: p.Payload) -> tuple[int, ...]:
    """One for each interrupt, or none: that takes them away."""
    if isinstance(payload, p.SetIrqs) and payload.flags & IrqSet.DATA_EVENTFD:
        return 0, payload.count
    return (0,)


def _table(*rows: Row) -> Mapping[int, Row]:
    return MappingProxyType({int(row.command): row for row in rows})


_C = Command

COMMANDS: Final = _table(
    Row(command=_C.VERSION, payload=p.Version, reply=p.Version),
    Row(command=_C.DMA_MAP, payload=p.DmaMap, fds=(0, 1)),
    Row(command=_C.DMA_UNMAP, payload=p.DmaUnmap, reply=p.DmaUnmap),
    Row(command=_C.DEVICE_GET_INFO, payload=p.DeviceInfo, reply=p.DeviceInfo),
    Row(command=_C.DEVICE_GET_REGION_INFO, payload=p.RegionInfo, reply=p.RegionInfo, reply_fds=(0, 1)),
    Row(command=_C.DEVICE_GET_REGION_IO_FDS, payload=p.RegionIoFds, reply=p.RegionIoFds, reply_fds=(0, MAX_FDS)),
    Row(command=_C.DEVICE_GET_IRQ_INFO, payload=p.IrqInfo, reply=p.IrqInfo),
    Row(command=_C.DEVICE_SET_IRQS, payload=p.SetIrqs, fds=(0, MAX_FDS), fd_counts=_irq_fds),
    Row(command=_C.REGION_READ, payload=p.RegionAccess, reply=p.RegionData),
    Row(command=_C.REGION_WRITE, payload=p.RegionData, reply=p.RegionAccess),
    Row(command=_C.DMA_READ, payload=p.DmaAccess, reply=p.DmaData, from_server=True),
    Row(command=_C.DMA_WRITE, payload=p.DmaData, reply=p.DmaWritten, from_server=True),
    Row(command=_C.DEVICE_RESET),
    Row(command=_C.REGION_WRITE_MULTI, payload=p.WriteMulti, reply=p.WriteCount),
    Row(command=_C.DEVICE_FEATURE, payload=p.Feature, reply=p.Feature),
    Row(command=_C.MIG_DATA_READ, payload=p.MigrationData, reply=p.MigrationData),
    Row(command=_C.MIG_DATA_WRITE, payload=p.MigrationData),
)
"""Every command, by its number."""


def render() -> str:
    """The table as text, a line for each command, for documentation and for reading a trace."""

    def count(least: int, largest: int) -> str:
        return f"{least}" if least == largest else f"{least} to {largest}"

    lines: list[str] = []
    for title, from_server in (("client to server", False), ("server to client", True)):
        lines += [title, "=" * len(title)]
        lines += [
            f"{number:3} {row.name}: {row.payload.describe()}; fds {count(*row.fds)}; reply: {row.reply.describe()}"
            + (f" and {count(*row.reply_fds)} fds" if row.reply_fds != (0, 0) else "")
            for number, row in sorted(COMMANDS.items())
            if row.from_server == from_server
        ]
        lines.append("")
    return "\n".join(lines)
