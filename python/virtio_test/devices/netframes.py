"""Frames of the network device, and the back-ends that are known by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from virtio_test.errors import InvalidArgument
from virtio_test.spec.net import ETHERNET_HEADER, VLAN_TAG, HeaderFlags

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["LONGEST", "Backend", "Frame", "Generate"]

LONGEST: Final = 0xFFFF + ETHERNET_HEADER + VLAN_TAG
"""Bytes of the largest frame where no mtu was agreed upon."""

_SOURCE: Final = bytes.fromhex("02005e100003")
_LOCAL_EXPERIMENT: Final = b"\x88\xb5"
_TAG: Final = 8


@dataclass(frozen=True)
class Generate:
    """A back-end that fills the receive buffers of each pair, and drops what it is sent.

    A frame is for the driver's address, of the type for local experiments, and carries its number in the pair, from 0
    on, in 8 big-endian bytes where they fit; the rest is zero.

    Attributes:
        size: bytes of each frame, from 14 on.
        count: frames for each pair after a reset; None never ends.
    """

    size: int = 64
    count: int | None = None

    def __post_init__(self) -> None:
        if not ETHERNET_HEADER <= self.size <= LONGEST:
            raise InvalidArgument(f"frames of {self.size} bytes; {ETHERNET_HEADER} to {LONGEST} are possible")
        if self.count is not None and not 0 <= self.count < 1 << 64:
            raise InvalidArgument(f"{self.count} frames cannot be generated")

    @property
    def number_at(self) -> int | None:
        """Where in a frame its number goes."""
        return ETHERNET_HEADER if self.size >= ETHERNET_HEADER + _TAG else None

    def frame(self, mac: bytes, number: int) -> bytes:
        """Frame `number` for the address `mac`."""
        tag = (number & (1 << 8 * _TAG) - 1).to_bytes(_TAG, "big")
        body = b"" if self.number_at is None else tag
        return (mac + _SOURCE + _LOCAL_EXPERIMENT + body).ljust(self.size, b"\0")


Answer: TypeAlias = "Callable[[bytes], Iterable[Buffer] | None]"
Backend: TypeAlias = "Literal['loopback', 'drop'] | Generate | Answer"


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame, and the header's words about the checksum that it lacks."""

    data: bytes
    flags: int = 0
    csum_start: int = 0
    csum_offset: int = 0

    def whole(self) -> bytes:
        """The frame with its checksum (5.1.9.2): the sum of 16-bit words from `csum_start` on, in ones' complement."""
        if not self.flags & HeaderFlags.NEEDS_CSUM:
            return self.data
        summed = self.data[self.csum_start :]
        total = sum(int.from_bytes(summed[at : at + 2].ljust(2, b"\0"), "big") for at in range(0, len(summed), 2))
        while total >> 16:
            total = (total & 0xFFFF) + (total >> 16)
        at = self.csum_start + self.csum_offset
        return self.data[:at] + (~total & 0xFFFF).to_bytes(2, "big") + self.data[at + 2 :]
