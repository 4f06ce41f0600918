"""The rules that a peer can break in the vhost-user protocol, each with one stable name.

A `MessageError` names the rule and the section of the protocol's document that states it; the catalogue rows
that each rule answers stand behind it.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final, NamedTuple

from virtio_test.errors import MessageError

__all__ = ["MESSAGE_RULES", "MessageRule", "violation"]


class MessageRule(NamedTuple):
    """One rule.

    Attributes:
        name: stable name.
        section: section of vhost-user.rst.
        summary: what must hold.
        row: row of the robustness catalogue.
    """

    name: str
    section: str
    summary: str
    row: str


_RULES: Final = (
    MessageRule("BadVersion", "Header", "the version in the flags is 1", "M01"),
    MessageRule("ReservedFlags", "Header", "flag bits 4 to 31 are 0", "M01"),
    MessageRule("ReplyFlag", "Header", "replies carry the reply flag, requests do not", "M01"),
    MessageRule("MessageTooLong", "Header", "no payload is longer than 4096 bytes", "M01"),
    MessageRule("PayloadSize", "Payload", "the payload has the size of its request", "M01"),
    MessageRule("Truncated", "Communication", "a message ends before the connection does", "M02"),
    MessageRule("FdCount", "Communication", "as many fds come with a message as its request asks for", "M03"),
    MessageRule("UnexpectedReply", "Communication", "a reply answers the request that was sent", "M01"),
    MessageRule("RepliesUnread", "Communication", "whoever asks reads the replies", "M02"),
    MessageRule("Refused", "VHOST_USER_PROTOCOL_F_REPLY_ACK", "the back-end can do what it is asked for", "M16"),
    MessageRule("UnknownRequest", "Front-end message types", "the request is one of the protocol", "M16"),
    MessageRule("NotNegotiated", "Protocol features", "the request's protocol feature is negotiated", "M16"),
    MessageRule("NotSupported", "Front-end message types", "the request is one that this back-end serves", "M16"),
    MessageRule("FeatureNotOffered", "VHOST_USER_SET_FEATURES", "only offered features are set", "M04"),
    MessageRule("FeaturesRefused", "VHOST_USER_SET_FEATURES", "features come with those that they require", "M04"),
    MessageRule("FeaturesWhileRunning", "VHOST_USER_SET_FEATURES", "features stay while rings run", "M04"),
    MessageRule(
        "ProtocolFeatureNotOffered",
        "VHOST_USER_SET_PROTOCOL_FEATURES",
        "only offered protocol features are set",
        "M04",
    ),
    MessageRule(
        "InbandAlone",
        "In-band notifications",
        "in-band notifications come with a back-end channel and acknowledgements",
        "M04",
    ),
    MessageRule("RegionCount", "VHOST_USER_SET_MEM_TABLE", "a memory table has 1 to 8 regions", "M05"),
    MessageRule("RegionSize", "Memory region description", "a region is not empty", "M05"),
    MessageRule("RegionWrap", "Memory region description", "no address or offset of a region exceeds 64 bits", "M05"),
    MessageRule("RegionOverlap", "Memory region description", "regions overlap in neither address space", "M05, M06"),
    MessageRule("RegionFile", "VHOST_USER_SET_MEM_TABLE", "the fd of a region is a file that can be mapped", "M05"),
    MessageRule("RegionBeyondFile", "VHOST_USER_SET_MEM_TABLE", "a region lies within its file", "M05"),
    MessageRule("RegionRefused", "VHOST_USER_SET_MEM_TABLE", "the memory can be mapped", "M05"),
    MessageRule("RegionUnknown", "VHOST_USER_REM_MEM_REG", "a region that is removed is in the table", "M06"),
    MessageRule("RegionSlots", "VHOST_USER_ADD_MEM_REG", "no more regions are added than slots were named", "M06"),
    MessageRule("VringIndex", "Multiple queue support", "the queue is one of the device", "M11"),
    MessageRule("VringSize", "VHOST_USER_SET_VRING_NUM", "the size of a queue is a legal one", "M09"),
    MessageRule("VringBase", "VHOST_USER_SET_VRING_BASE", "the base lies within the ring", "M08"),
    MessageRule("VringOrder", "VHOST_USER_SET_VRING_ADDR", "a queue has its size before its addresses", "M09"),
    MessageRule("VringAddress", "VHOST_USER_SET_VRING_ADDR", "ring addresses lie in shared memory, aligned", "M09"),
    MessageRule("VringFlags", "VHOST_USER_SET_VRING_ADDR", "only the log flag is defined, for LOG_SHMFD", "M09"),
    MessageRule("VringValue", "Front-end message types", "no reserved bit of a queue's number is set", "M09"),
    MessageRule("FdType", "VHOST_USER_SET_VRING_KICK", "kick fds are eventfds or pipes; others may be sockets", "M10"),
    MessageRule("ConfigRange", "Virtio device config space", "an access lies within the configuration space", "M01"),
    MessageRule("ConfigSize", "VHOST_USER_GET_CONFIG", "the reply has as many bytes as were asked for", "M01"),
    MessageRule("ConfigFlags", "Virtio device config space", "the kind of a configuration access is 0 or 1", "M01"),
    MessageRule("DeviceFailed", "Communication", "the device can do what the request makes it do", "M16"),
    MessageRule("QueueCount", "Multiple queue support", "a device has 1 to 256 queues, as indices have 8 bits", "M11"),
    MessageRule(
        "InflightRegion",
        "VHOST_USER_GET_INFLIGHT_FD",
        "the region has room for every queue, in a file of its own",
        "R11, M20",
    ),
    MessageRule("InflightState", "Inflight I/O tracking", "the record of what is in flight fits its queue", "R11, M20"),
    MessageRule("InflightWhileRunning", "VHOST_USER_SET_INFLIGHT_FD", "a region comes before its rings run", "M11"),
    MessageRule("LogRange", "VHOST_USER_SET_LOG_BASE", "a dirty log is not empty, and lies within its file", "M15"),
    MessageRule("LogFile", "VHOST_USER_SET_LOG_BASE", "the fd of a dirty log is a file that can be mapped", "M15"),
    MessageRule(
        "LogTooSmall", "Migration", "the dirty log covers all shared memory, and where a ring is logged", "M15"
    ),
    MessageRule("IotlbType", "An IOTLB message", "a front-end updates and invalidates", "M17"),
    MessageRule("IotlbRange", "An IOTLB message", "no entry is empty, wraps, or cuts a word", "M17"),
    MessageRule("IotlbPermission", "An IOTLB message", "an entry allows reading, writing or both", "M17"),
    MessageRule("IotlbAddress", "IOMMU support", "an entry lies within shared memory", "M17"),
    MessageRule("IotlbRefused", "IOMMU support", "a ring lies where the IOMMU has translations for it", "B16"),
    MessageRule("StatusValue", "VHOST_USER_SET_STATUS", "a device status has 8 bits", "M01"),
)

MESSAGE_RULES: Final = MappingProxyType({rule.name: rule for rule in _RULES})
"""Every rule by its name."""


def violation(name: str, message: str, *, queue: int | None = None) -> MessageError:
    """The error for the broken rule `name`; `message` says what was found and what was expected."""
    return MessageError(name, f"vhost-user, {MESSAGE_RULES[name].section}", message, queue=queue)
