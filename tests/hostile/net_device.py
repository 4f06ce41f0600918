"""A small network device for attacks on what network devices got wrong: headers, merged buffers, tables, commands.

Real as far as it goes: it runs on `BaseDevice` behind any transport, and `NetDriver` drives it. Frames that are sent
are kept, `receive` delivers one, and the control queue knows the MAC table and the indirection table of RSS.
"""

from __future__ import annotations

import struct
from typing import Final

from virtio_test._core import Chain
from virtio_test.config import ConfigLayout, ConfigSpace
from virtio_test.devices.base import BaseDevice
from virtio_test.errors import QueueViolation, StaleMemory
from virtio_test.features import FeatureSet
from virtio_test.spec.ids import DeviceId
from virtio_test.spec.net import (
    CONFIG_FIELDS,
    CONTROL_ERR,
    CONTROL_OK,
    FEATURE_NAMES,
    HEADER,
    HEADER_LEGACY,
    MAC_TABLE_SET,
    RECEIVE_QUEUE,
    REQUIRES,
    TRANSMIT_QUEUE,
    ControlClass,
)

CONTROL_QUEUE: Final = 2
MAC: Final = bytes.fromhex("525400123456")
PAIRS: Final = 1
RSS_CONFIG: Final = 1
MAX_TABLE: Final = 128
HASH_BYTES: Final = 8
"""What HASH_REPORT adds to the header (5.1.9)."""

OFFER: Final = FeatureSet("MAC", "MRG_RXBUF", "CTRL_VQ", "CTRL_RX", "RSS", "HASH_REPORT", device=FEATURE_NAMES)


class NetDevice(BaseDevice):
    """One pair of queues and a control queue.

    Attributes:
        sent: frames that the driver has sent, without their headers.
        odd: what the driver sent and was no frame or no command.
        addresses: the MAC table.
        table: the indirection table of RSS.
    """

    def __init__(self, offer: FeatureSet = OFFER) -> None:
        super().__init__(
            DeviceId.NET,
            handlers={TRANSMIT_QUEUE: self._transmit, CONTROL_QUEUE: self._command},
            queue_sizes=(64, 64, 64),
            features=offer,
            config=ConfigSpace(ConfigLayout(*CONFIG_FIELDS), mac=MAC),
            requires=REQUIRES,
        )
        self.sent: list[bytes] = []
        self.odd = 0
        self.addresses: list[bytes] = []
        self.table: list[int] = []

    @property
    def header_bytes(self) -> int:
        """Bytes before each frame, by what was negotiated and never by what comes (5.1.9.1)."""
        if "HASH_REPORT" in self.negotiated:
            return HEADER.size + HASH_BYTES
        new = {"VERSION_1", "MRG_RXBUF"} & set(self.negotiated)
        return HEADER.size if new else HEADER_LEGACY.size

    def _transmit(self, request: bytes) -> None:
        if len(request) <= self.header_bytes:
            self.odd += 1
        else:
            self.sent.append(request[self.header_bytes :])

    # --- receiving ------------------------------------------------------------------------------------------

    def receive(self, frame: bytes) -> bool:
        """Deliver `frame`, in several buffers with MRG_RXBUF; False when it does not fit, and nothing is touched."""
        queue = self.queue(RECEIVE_QUEUE)
        total = self.header_bytes + len(frame)
        taken: list[Chain] = []
        try:
            while sum(chain.writable for chain in taken) < total:
                chain = queue.pop() if not taken or "MRG_RXBUF" in self.negotiated else None
                if chain is None:
                    break
                taken.append(chain)
            else:
                self.fill(taken, frame)
                for chain in taken:
                    queue.push(chain)
                queue.signal()
                return True
        except QueueViolation as error:
            # What was taken before is not ours any more either.
            self.bus.broken(error)
            return False
        except StaleMemory:
            pass
        for chain in reversed(taken):
            queue.unpop(chain)
        return False

    def fill(self, chains: list[Chain], frame: bytes) -> None:
        """Everything is written before the first of them is shown."""
        fields = (0, 0, 0, 0, 0, 0)
        header = HEADER_LEGACY.pack(*fields)
        if self.header_bytes > len(header):
            header = HEADER.pack(*fields, len(chains))
        data = header.ljust(self.header_bytes, b"\0") + frame
        for chain in chains:
            data = data[chain.write(data) :]

    # --- commands -------------------------------------------------------------------------------------------

    def _command(self, request: bytes) -> bytes:
        try:
            done = self._obey(request)
        except struct.error:
            done = False
        self.odd += not done
        return bytes([CONTROL_OK if done else CONTROL_ERR])

    def _obey(self, request: bytes) -> bool:
        """Whether a command is one; nothing is taken over of what is not.

        Raises:
            struct.error: it ends early.
        """
        kind, command = struct.unpack_from("<BB", request)
        if (kind, command) == (ControlClass.MAC, MAC_TABLE_SET):
            return self._set_addresses(request[2:])
        if (kind, command) == (ControlClass.MQ, RSS_CONFIG):
            return self._set_table(request[2:])
        return False

    def _set_addresses(self, data: bytes) -> bool:
        """Two tables, each a count of 32 bits and that many addresses (5.1.9.5.2)."""
        found: list[bytes] = []
        for _ in range(2):
            (count,) = struct.unpack_from("<I", data)
            end = 4 + 6 * count
            if end > len(data):
                return False
            found += [data[at : at + 6] for at in range(4, end, 6)]
            data = data[end:]
        self.addresses = found
        return not data

    def _set_table(self, data: bytes) -> bool:
        """The indirection table (5.1.9.5.7): every entry is one of our queues, and its length a power of two."""
        _types, mask, _unclassified = struct.unpack_from("<IHH", data)
        count = mask + 1
        if count & mask or count > MAX_TABLE:
            return False
        entries = struct.unpack_from(f"<{count}H", data, 8)
        if any(entry >= PAIRS for entry in entries):
            return False
        self.table = list(entries)
        return True
