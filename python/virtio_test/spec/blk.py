"""The block device (VIRTIO 1.4, 5.2): feature bits, configuration space, requests, status codes."""

from enum import IntEnum
from struct import Struct
from types import MappingProxyType
from typing import Final, Literal

SECTOR: Final = 512
"""Bytes of the sectors that the protocol counts in, whatever the block size is (5.2.5)."""

FEATURE_NAMES: Final = MappingProxyType(
    {
        "SIZE_MAX": 1,
        "SEG_MAX": 2,
        "GEOMETRY": 4,
        "RO": 5,
        "BLK_SIZE": 6,
        "FLUSH": 9,
        "TOPOLOGY": 10,
        "CONFIG_WCE": 11,
        "MQ": 12,
        "DISCARD": 13,
        "WRITE_ZEROES": 14,
        "LIFETIME": 15,
        "SECURE_ERASE": 16,
        "ZONED": 17,
    }
)
"""Feature bits of the class (5.2.3). None of them requires another."""

LEGACY_FEATURE_NAMES: Final = MappingProxyType({"BARRIER": 0, "SCSI": 7})
"""Bits that only the legacy interface knows (5.2.3.1)."""

CONFIG_FIELDS: Final[tuple[tuple[str, str] | tuple[str, str, Literal["ro", "rw"]], ...]] = (
    ("capacity", "le64"),
    ("size_max", "le32"),
    ("seg_max", "le32"),
    ("cylinders", "le16"),
    ("heads", "u8"),
    ("sectors", "u8"),
    ("blk_size", "le32"),
    ("physical_block_exp", "u8"),
    ("alignment_offset", "u8"),
    ("min_io_size", "le16"),
    ("opt_io_size", "le32"),
    ("writeback", "u8", "rw"),
    ("unused0", "u8"),
    ("num_queues", "le16"),
    ("max_discard_sectors", "le32"),
    ("max_discard_seg", "le32"),
    ("discard_sector_alignment", "le32"),
    ("max_write_zeroes_sectors", "le32"),
    ("max_write_zeroes_seg", "le32"),
    ("write_zeroes_may_unmap", "u8"),
    ("unused1", "bytes(3)"),
    ("max_secure_erase_sectors", "le32"),
    ("max_secure_erase_seg", "le32"),
    ("secure_erase_sector_alignment", "le32"),
    ("zone_sectors", "le32"),
    ("max_open_zones", "le32"),
    ("max_active_zones", "le32"),
    ("max_append_sectors", "le32"),
    ("write_granularity", "le32"),
    ("model", "u8"),
    ("unused2", "bytes(3)"),
)
"""`struct virtio_blk_config` (5.2.4); `capacity`, `*_sectors` and `*_alignment` count 512 bytes."""

FIELD_FEATURES: Final = MappingProxyType(
    {
        "size_max": "SIZE_MAX",
        "seg_max": "SEG_MAX",
        "cylinders": "GEOMETRY",
        "heads": "GEOMETRY",
        "sectors": "GEOMETRY",
        "blk_size": "BLK_SIZE",
        "physical_block_exp": "TOPOLOGY",
        "alignment_offset": "TOPOLOGY",
        "min_io_size": "TOPOLOGY",
        "opt_io_size": "TOPOLOGY",
        "writeback": "CONFIG_WCE",
        "num_queues": "MQ",
        "max_discard_sectors": "DISCARD",
        "max_discard_seg": "DISCARD",
        "discard_sector_alignment": "DISCARD",
        "max_write_zeroes_sectors": "WRITE_ZEROES",
        "max_write_zeroes_seg": "WRITE_ZEROES",
        "write_zeroes_may_unmap": "WRITE_ZEROES",
        "max_secure_erase_sectors": "SECURE_ERASE",
        "max_secure_erase_seg": "SECURE_ERASE",
        "secure_erase_sector_alignment": "SECURE_ERASE",
    }
)
"""The feature that a field of the configuration space depends on; `capacity` is always there (5.2.4)."""


class RequestType(IntEnum):
    """What a request asks for (5.2.6)."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    GET_LIFETIME = 10
    DISCARD = 11
    WRITE_ZEROES = 13
    SECURE_ERASE = 14


FLUSH_OUT: Final = 5
"""The legacy interface's other name for FLUSH (5.2.6.3)."""


class RequestStatus(IntEnum):
    """The last byte of a request, which the device writes (5.2.6)."""

    OK = 0
    IOERR = 1
    UNSUPP = 2


HEADER: Final = Struct("<IIQ")
"""type, reserved (legacy: ioprio), sector."""

SEGMENT: Final = Struct("<QII")
"""sector, num_sectors, flags: what a discard, write zeroes or secure erase request is made of."""

SEGMENT_UNMAP: Final = 1
"""The one defined flag of a segment, for write zeroes only."""

LIFETIME: Final = Struct("<3H")
"""pre_eol_info, device_lifetime_est_typ_a, device_lifetime_est_typ_b."""

LIFETIME_LIMITS: Final = (3, 11, 11)
"""The largest values of these that are not reserved."""

ID_SIZE: Final = 20
"""Bytes of the device ID string, padded with NUL."""
