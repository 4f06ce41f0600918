"""The rules that a peer can break in the vfio-user protocol, each with one stable name.

A `MessageError` names the rule and the section of the protocol's document that states it. Two kinds of violation
exist. A message that breaks a rule of framing or order ends the connection, because nothing behind it can be
trusted. A command that is well-formed and cannot be honoured is *refused*: it is answered with an errno and has
changed nothing (`Refused`).
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final, NamedTuple

from virtio_test.errors import MessageError

__all__ = ["MESSAGE_RULES", "MessageRule", "Refused", "violation"]


class MessageRule(NamedTuple):
    """One rule.

    Attributes:
        name: stable name.
        section: section of vfio-user.rst.
        summary: what must hold.
    """

    name: str
    section: str
    summary: str


_RULES: Final = (
    MessageRule("MessageType", "Header", "the type in the flags is 0 (command) or 1 (reply)"),
    MessageRule("ReservedFlags", "Header", "flag bits 6 to 31 are 0; No_reply is for commands, Error for replies"),
    MessageRule("MessageSize", "Header", "a message is as long as its header and its command say"),
    MessageRule("MessageTooLong", "Message sizes", "no message carries more than 1 MiB of data"),
    MessageRule("Direction", "Commands", "a command comes from the side that the table of commands names"),
    MessageRule("Truncated", "Socket Disconnection Behavior", "a message ends before the connection does"),
    MessageRule("FdCount", "Version", "as many fds come with a message as its command asks for, 16 at most"),
    MessageRule("FdType", "Socket", "fds are files or eventfds, never sockets"),
    MessageRule("UnexpectedReply", "Header", "a reply carries the id of a command that waits for one"),
    MessageRule("RepliesUnread", "Command Concurrency", "a peer reads what it is sent"),
    MessageRule("TooManyCommands", "Command Concurrency", "few commands are sent while one of ours is unanswered"),
    MessageRule("ReplyLate", "Command Concurrency", "neither side stalls replies for ever"),
    MessageRule("ReplyData", "VFIO_USER_DMA_READ", "a reply carries the address and the count that were asked for"),
    MessageRule("VersionFirst", "VFIO_USER_VERSION", "VERSION is the first command, and comes once"),
    MessageRule("VersionMajor", "VFIO_USER_VERSION", "the major version is 0"),
    MessageRule("VersionData", "VFIO_USER_VERSION", "version data is one JSON object, NUL-terminated"),
    MessageRule("Capability", "VFIO_USER_VERSION", "a capability has the type and the range that are documented"),
    MessageRule("UnknownCommand", "Commands", "the command is one of the protocol"),
    MessageRule("NotSupported", "Commands", "the command is one that this server serves"),
    MessageRule("DmaFlags", "VFIO_USER_DMA_MAP", "a region is readable, writeable or both, and no other flag is set"),
    MessageRule("DmaRange", "VFIO_USER_DMA_MAP", "a region is not empty, aligned, and ends within 64 bits"),
    MessageRule("DmaExists", "VFIO_USER_DMA_MAP", "no region is mapped over another"),
    MessageRule("DmaFile", "VFIO_USER_DMA_MAP", "the fd of a region is a file that holds all of it and can be mapped"),
    MessageRule("DmaSlots", "VFIO_USER_VERSION", "no more regions are mapped than max_dma_maps says"),
    MessageRule("UnmapFlags", "VFIO_USER_DMA_UNMAP", "no dirty bitmap is asked for, and no unknown flag is set"),
    MessageRule("UnmapSplit", "VFIO_USER_DMA_UNMAP", "a region is unmapped whole or not at all"),
    MessageRule("ArgumentSize", "Message sizes", "argsz has room for the fixed part of the reply"),
    MessageRule("RegionIndex", "VFIO_USER_DEVICE_GET_REGION_INFO", "the region is one of the device"),
    MessageRule("RegionRange", "VFIO_USER_REGION_READ", "an access lies within its region"),
    MessageRule("TransferSize", "Read and Write Operations", "count is 1 to max_data_xfer_size and fits the data"),
    MessageRule("WriteMulti", "VFIO_USER_REGION_WRITE_MULTI", "wr_cnt writes of 1 to 8 bytes are there"),
    MessageRule("IrqIndex", "VFIO_USER_DEVICE_GET_IRQ_INFO", "the interrupt type is one of the device"),
    MessageRule("IrqFlags", "VFIO_USER_DEVICE_SET_IRQS", "one data flag and one action flag are set, no other"),
    MessageRule("IrqRange", "VFIO_USER_DEVICE_SET_IRQS", "start and count lie within the interrupts of the type"),
    MessageRule("IrqData", "VFIO_USER_DEVICE_SET_IRQS", "there is a byte for each interrupt with DATA_BOOL, else none"),
    MessageRule("IrqFd", "VFIO_USER_DEVICE_SET_IRQS", "the fd of an interrupt is an eventfd"),
    MessageRule("CommandRefused", "Commands", "a command that the protocol allows is honoured"),
    MessageRule("DeviceFailed", "Commands", "the device can do what the command makes it do"),
)

MESSAGE_RULES: Final = MappingProxyType({rule.name: rule for rule in _RULES})
"""Every rule by its name."""


def violation(name: str, message: str) -> MessageError:
    """The error for the broken rule `name`; `message` says what was found and what was expected."""
    return MessageError(name, f"vfio-user, {MESSAGE_RULES[name].section}", message)


class Refused(Exception):
    """A well-formed command cannot be honoured.

    Attributes:
        errno: the answer.
        error: the broken rule.
    """

    def __init__(self, errno: int, name: str, message: str) -> None:
        super().__init__(errno, name, message)
        self.errno = errno
        self.error = violation(name, message)
