"""The network device (VIRTIO 1.4, 5.1): feature bits and what they require, configuration space, header, commands."""

from enum import IntEnum, IntFlag
from struct import Struct
from types import MappingProxyType
from typing import Final, Literal

FEATURE_NAMES: Final = MappingProxyType(
    {
        "CSUM": 0,
        "GUEST_CSUM": 1,
        "CTRL_GUEST_OFFLOADS": 2,
        "MTU": 3,
        "MAC": 5,
        "GUEST_TSO4": 7,
        "GUEST_TSO6": 8,
        "GUEST_ECN": 9,
        "GUEST_UFO": 10,
        "HOST_TSO4": 11,
        "HOST_TSO6": 12,
        "HOST_ECN": 13,
        "HOST_UFO": 14,
        "MRG_RXBUF": 15,
        "STATUS": 16,
        "CTRL_VQ": 17,
        "CTRL_RX": 18,
        "CTRL_VLAN": 19,
        "CTRL_RX_EXTRA": 20,
        "GUEST_ANNOUNCE": 21,
        "MQ": 22,
        "CTRL_MAC_ADDR": 23,
        "DEVICE_STATS": 50,
        "HASH_TUNNEL": 51,
        "VQ_NOTF_COAL": 52,
        "NOTF_COAL": 53,
        "GUEST_USO4": 54,
        "GUEST_USO6": 55,
        "HOST_USO": 56,
        "HASH_REPORT": 57,
        "GUEST_HDRLEN": 59,
        "RSS": 60,
        "RSC_EXT": 61,
        "STANDBY": 62,
        "SPEED_DUPLEX": 63,
        "RSS_CONTEXT": 64,
        "GUEST_UDP_TUNNEL_GSO": 65,
        "GUEST_UDP_TUNNEL_GSO_CSUM": 66,
        "HOST_UDP_TUNNEL_GSO": 67,
        "HOST_UDP_TUNNEL_GSO_CSUM": 68,
        "OUT_NET_HEADER": 69,
        "IPSEC": 70,
    }
)
"""Feature bits of the class (5.1.3)."""

_CTRL: Final = ("CTRL_VQ",)

REQUIRES: Final = MappingProxyType(
    {
        **dict.fromkeys(("GUEST_TSO4", "GUEST_TSO6", "GUEST_UFO", "GUEST_USO4", "GUEST_USO6"), ("GUEST_CSUM",)),
        "GUEST_ECN": ("GUEST_TSO4|GUEST_TSO6",),
        "GUEST_UDP_TUNNEL_GSO": ("GUEST_TSO4", "GUEST_TSO6", "GUEST_USO4", "GUEST_USO6"),
        "GUEST_UDP_TUNNEL_GSO_CSUM": ("GUEST_UDP_TUNNEL_GSO",),
        **dict.fromkeys(("HOST_TSO4", "HOST_TSO6", "HOST_UFO", "HOST_USO"), ("CSUM",)),
        "HOST_ECN": ("HOST_TSO4|HOST_TSO6",),
        "HOST_UDP_TUNNEL_GSO": ("HOST_TSO4", "HOST_TSO6", "HOST_USO"),
        "HOST_UDP_TUNNEL_GSO_CSUM": ("HOST_UDP_TUNNEL_GSO",),
        **dict.fromkeys(("CTRL_RX", "CTRL_VLAN", "GUEST_ANNOUNCE", "MQ", "CTRL_MAC_ADDR"), _CTRL),
        **dict.fromkeys(("NOTF_COAL", "RSS", "VQ_NOTF_COAL"), _CTRL),
        "RSC_EXT": ("HOST_TSO4|HOST_TSO6",),
        "HASH_TUNNEL": ("CTRL_VQ", "RSS|HASH_REPORT"),
        "RSS_CONTEXT": ("CTRL_VQ", "RSS"),
    }
)
"""Feature to what it requires (5.1.3.1); names joined by ``|`` are alternatives."""

CONFIG_FIELDS: Final[tuple[tuple[str, str] | tuple[str, str, Literal["ro", "rw"]], ...]] = (
    ("mac", "bytes(6)"),
    ("status", "le16"),
    ("max_virtqueue_pairs", "le16"),
    ("mtu", "le16"),
    ("speed", "le32"),
    ("duplex", "u8"),
    ("rss_max_key_size", "u8"),
    ("rss_max_indirection_table_length", "le16"),
    ("supported_hash_types", "le32"),
    ("supported_tunnel_types", "le32"),
)
"""`struct virtio_net_config` (5.1.4): read-only, except for `mac` through the legacy interface (5.1.4.3)."""


class LinkStatus(IntFlag):
    """Bits of the field `status` (5.1.4)."""

    LINK_UP = 1
    ANNOUNCE = 2


RECEIVE_QUEUE: Final = 0
TRANSMIT_QUEUE: Final = 1
"""receiveq1 and transmitq1; the control queue follows the last pair (5.1.2)."""

HEADER_LEGACY: Final = Struct("<BBHHHH")
"""flags, gso_type, hdr_len, gso_size, csum_start, csum_offset: legacy without MRG_RXBUF (5.1.9.1)."""

HEADER: Final = Struct("<BBHHHHH")
"""The same and num_buffers (5.1.9)."""


class HeaderFlags(IntFlag):
    """The header's field `flags` (5.1.9)."""

    NEEDS_CSUM = 1
    DATA_VALID = 2
    RSC_INFO = 4
    UDP_TUNNEL_CSUM = 8
    SECURITY = 16
    SECURITY_ERR = 32
    SECURITY_SA_SOFT_EXPIRY_WARN = 64


GSO_NONE: Final = 0
"""The header's `gso_type` of a plain packet."""

ETHERNET_HEADER: Final = 14
VLAN_TAG: Final = 4
MAX_FRAME: Final = 1514
"""Bytes of the largest frame without segmentation offload (5.1.9.3)."""

PAIRS_RANGE: Final = range(1, 0x8001)
"""What a device may show in `max_virtqueue_pairs` (5.1.4.1)."""

MTU_RANGE: Final = range(68, 65536)
"""What a device may show in `mtu` (5.1.4.1)."""


class ControlClass(IntEnum):
    """Classes of commands of the control queue (5.1.9.5)."""

    RX = 0
    MAC = 1
    VLAN = 2
    ANNOUNCE = 3
    MQ = 4


RX_PROMISC: Final = 0
RX_ALLMULTI: Final = 1
RX_EXTRA: Final = range(2, 6)
"""ALLUNI, NOMULTI, NOUNI, NOBCAST: with CTRL_RX_EXTRA."""

MAC_TABLE_SET: Final = 0
MAC_ADDR_SET: Final = 1
VLAN_ADD: Final = 0
VLAN_DEL: Final = 1
VLAN_IDS: Final = range(4096)
ANNOUNCE_ACK: Final = 0
MQ_VQ_PAIRS_SET: Final = 0

CONTROL_OK: Final = 0
CONTROL_ERR: Final = 1
"""The byte `ack` of a command."""
