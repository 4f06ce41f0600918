"""The one table of the vhost-user protocol: every request, both ways, with all that is fixed about it.

Theory
------
A message is a header (request, flags, size: 32 bits each) and a payload; file descriptors travel beside it.
A row of the table says for one request: its number, what it carries, what its reply carries, how many fds come
with either, and which protocol feature must have been negotiated. Codec, back-end, front-end, documentation
(`render`) and tests read the same rows; none of them knows a message otherwise.

A request whose row names a reply is always answered with it. Any other one is answered with a number, 0 for
success, when its sender sets NEED_REPLY.

Source: QEMU, docs/interop/vhost-user.rst, the state of QEMU 11.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from types import MappingProxyType
from typing import Final

from . import payloads as p

__all__ = [
    "BACKEND_REQUESTS",
    "FRONTEND_REQUESTS",
    "HEADER_BYTES",
    "LOG_ALL_BIT",
    "MAX_FDS",
    "MAX_PAYLOAD",
    "PROTOCOL_FEATURES_BIT",
    "VERSION",
    "VRING_INDEX_MASK",
    "VRING_LOG",
    "VRING_NO_FD",
    "BackendRequest",
    "Flag",
    "IotlbType",
    "Permission",
    "ProtocolFeature",
    "Request",
    "Row",
    "render",
]

VERSION: Final = 1
HEADER_BYTES: Final = 12
MAX_PAYLOAD: Final = 4096
"""No payload of the protocol is longer; a header that announces more is malformed."""
MAX_FDS: Final = 253
"""What Linux carries beside one write (SCM_MAX_FD): room for all, so that none is cut off unseen."""
PROTOCOL_FEATURES_BIT: Final = 30
"""The feature bit by which a back-end says that it knows protocol features."""
LOG_ALL_BIT: Final = 26
"""The feature bit by which a front-end has the pages marked that the back-end writes."""
VRING_LOG: Final = 1
"""The flag of SET_VRING_ADDR by which it has those of the used ring marked."""
VRING_INDEX_MASK: Final = 0xFF
VRING_NO_FD: Final = 0x100


class Flag(IntFlag):
    """The flags of a header; bits 0 and 1 are the version."""

    REPLY = 0x4
    NEED_REPLY = 0x8


class IotlbType(IntEnum):
    """What an IOTLB message says."""

    MISS = 1
    UPDATE = 2
    INVALIDATE = 3
    ACCESS_FAIL = 4


class Permission(IntFlag):
    """What an IOTLB entry allows, or what one is wanted for."""

    READ = 1
    WRITE = 2


class ProtocolFeature(IntFlag):
    """The protocol features."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19
    GET_VRING_BASE_INFLIGHT = 1 << 20
    GPA_ADDRESSES = 1 << 21
    SHMEM = 1 << 22
    GET_VRING_BASE_SKIP_DRAIN = 1 << 23


class Request(IntEnum):
    """What a front-end asks of a back-end."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43
    GET_SHMEM_CONFIG = 44
    GET_VRING_BASE_SKIP_DRAIN = 45


class BackendRequest(IntEnum):
    """What a back-end asks of a front-end, over the channel of SET_BACKEND_REQ_FD."""

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3
    VRING_CALL = 4
    VRING_ERR = 5
    SHARED_OBJECT_ADD = 6
    SHARED_OBJECT_REMOVE = 7
    SHARED_OBJECT_LOOKUP = 8
    SHMEM_MAP = 9
    SHMEM_UNMAP = 10


@dataclass(frozen=True, kw_only=True)
class Row:
    """One request of the protocol.

    Attributes:
        request: its number and name.
        payload: what the request carries.
        reply: what its reply carries; None when only NEED_REPLY makes it answered.
        fds: least and largest number of fds with the request.
        reply_fds: the same with the reply.
        needs: the protocol feature that must have been negotiated, if any.
        fd_count: how many fds exactly this payload asks for; None when `fds` says all.
        may_be_empty: the reply may come without its payload, which says that the request failed.
        refusable: the reply is that of an acknowledgement: a number other than 0 says that the request failed.
    """

    request: Request | BackendRequest
    payload: type[p.Payload] = p.Empty
    reply: type[p.Payload] | None = None
    fds: tuple[int, int] = (0, 0)
    reply_fds: tuple[int, int] = (0, 0)
    needs: ProtocolFeature | None = None
    fd_count: Callable[[p.Payload], int] | None = None
    may_be_empty: bool = False
    refusable: bool = False

    @property
    def name(self) -> str:
        """The name of the request."""
        return self.request.name


def _regions(payload: p.Payload) -> int:
    return len(payload.regions) if isinstance(payload, p.MemoryTable) else 0


def _unless_no_fd(payload: p.Payload) -> int:
    return 0 if isinstance(payload, p.U64) and payload.value & VRING_NO_FD else 1


def _table(*rows: Row) -> Mapping[int, Row]:
    return MappingProxyType({int(row.request): row for row in rows})


_R = Request
_B = BackendRequest
_F = ProtocolFeature

FRONTEND_REQUESTS: Final = _table(
    Row(request=_R.GET_FEATURES, reply=p.U64),
    Row(request=_R.SET_FEATURES, payload=p.U64),
    Row(request=_R.SET_OWNER),
    Row(request=_R.RESET_OWNER),
    Row(request=_R.SET_MEM_TABLE, payload=p.MemoryTable, fds=(0, p.MAX_TABLE_REGIONS), fd_count=_regions),
    Row(request=_R.SET_LOG_BASE, payload=p.Log, reply=p.U64, fds=(1, 1), needs=_F.LOG_SHMFD),
    Row(request=_R.SET_LOG_FD, fds=(1, 1), needs=_F.LOG_SHMFD),
    Row(request=_R.SET_VRING_NUM, payload=p.VringState),
    Row(request=_R.SET_VRING_ADDR, payload=p.VringAddress),
    Row(request=_R.SET_VRING_BASE, payload=p.VringState),
    Row(request=_R.GET_VRING_BASE, payload=p.VringState, reply=p.VringState),
    Row(request=_R.SET_VRING_KICK, payload=p.U64, fds=(0, 1), fd_count=_unless_no_fd),
    Row(request=_R.SET_VRING_CALL, payload=p.U64, fds=(0, 1), fd_count=_unless_no_fd),
    Row(request=_R.SET_VRING_ERR, payload=p.U64, fds=(0, 1), fd_count=_unless_no_fd),
    Row(request=_R.GET_PROTOCOL_FEATURES, reply=p.U64),
    Row(request=_R.SET_PROTOCOL_FEATURES, payload=p.U64),
    Row(request=_R.GET_QUEUE_NUM, reply=p.U64, needs=_F.MQ),
    Row(request=_R.SET_VRING_ENABLE, payload=p.VringState),
    Row(request=_R.SEND_RARP, payload=p.U64, needs=_F.RARP),
    Row(request=_R.NET_SET_MTU, payload=p.U64, needs=_F.MTU),
    Row(request=_R.SET_BACKEND_REQ_FD, fds=(1, 1), needs=_F.BACKEND_REQ),
    Row(request=_R.IOTLB_MSG, payload=p.Iotlb, reply=p.U64, refusable=True),
    Row(request=_R.SET_VRING_ENDIAN, payload=p.VringState, needs=_F.CROSS_ENDIAN),
    Row(request=_R.GET_CONFIG, payload=p.Config, reply=p.Config, needs=_F.CONFIG, may_be_empty=True),
    Row(request=_R.SET_CONFIG, payload=p.Config, needs=_F.CONFIG),
    Row(
        request=_R.CREATE_CRYPTO_SESSION,
        payload=p.CryptoSession,
        reply=p.CryptoSession,
        needs=_F.CRYPTO_SESSION,
    ),
    Row(request=_R.CLOSE_CRYPTO_SESSION, payload=p.U64, needs=_F.CRYPTO_SESSION),
    Row(request=_R.POSTCOPY_ADVISE, reply=p.Empty, reply_fds=(1, 1), needs=_F.PAGEFAULT),
    Row(request=_R.POSTCOPY_LISTEN, needs=_F.PAGEFAULT),
    Row(request=_R.POSTCOPY_END, reply=p.U64, needs=_F.PAGEFAULT),
    Row(request=_R.GET_INFLIGHT_FD, payload=p.Inflight, reply=p.Inflight, reply_fds=(0, 1), needs=_F.INFLIGHT_SHMFD),
    Row(request=_R.SET_INFLIGHT_FD, payload=p.Inflight, fds=(1, 1), needs=_F.INFLIGHT_SHMFD),
    Row(request=_R.GPU_SET_SOCKET, fds=(1, 1)),
    Row(request=_R.RESET_DEVICE, needs=_F.RESET_DEVICE),
    Row(request=_R.VRING_KICK, payload=p.VringState, needs=_F.INBAND_NOTIFICATIONS),
    Row(request=_R.GET_MAX_MEM_SLOTS, reply=p.U64, needs=_F.CONFIGURE_MEM_SLOTS),
    Row(request=_R.ADD_MEM_REG, payload=p.SingleRegion, fds=(1, 1), needs=_F.CONFIGURE_MEM_SLOTS),
    # Some front-ends send the fd along; it is closed unused, as the protocol says.
    Row(request=_R.REM_MEM_REG, payload=p.SingleRegion, fds=(0, 1), needs=_F.CONFIGURE_MEM_SLOTS),
    Row(request=_R.SET_STATUS, payload=p.U64, needs=_F.STATUS),
    Row(request=_R.GET_STATUS, reply=p.U64, needs=_F.STATUS),
    Row(
        request=_R.GET_SHARED_OBJECT,
        payload=p.SharedObject,
        reply=p.U64,
        reply_fds=(0, 1),
        needs=_F.SHARED_OBJECT,
        may_be_empty=True,
    ),
    Row(
        request=_R.SET_DEVICE_STATE_FD,
        payload=p.DeviceState,
        reply=p.U64,
        fds=(1, 1),
        reply_fds=(0, 1),
        needs=_F.DEVICE_STATE,
    ),
    Row(request=_R.CHECK_DEVICE_STATE, reply=p.U64, needs=_F.DEVICE_STATE),
    Row(request=_R.GET_SHMEM_CONFIG, reply=p.SharedMemoryConfig, needs=_F.SHMEM),
    Row(
        request=_R.GET_VRING_BASE_SKIP_DRAIN,
        payload=p.VringState,
        reply=p.VringState,
        needs=_F.GET_VRING_BASE_SKIP_DRAIN,
    ),
)
"""Every request of a front-end, by its number."""

BACKEND_REQUESTS: Final = _table(
    Row(request=_B.IOTLB_MSG, payload=p.Iotlb),
    Row(request=_B.CONFIG_CHANGE_MSG, needs=_F.CONFIG),
    Row(request=_B.VRING_HOST_NOTIFIER_MSG, payload=p.Area, fds=(0, 1), needs=_F.HOST_NOTIFIER),
    Row(request=_B.VRING_CALL, payload=p.VringState, needs=_F.INBAND_NOTIFICATIONS),
    Row(request=_B.VRING_ERR, payload=p.VringState, needs=_F.INBAND_NOTIFICATIONS),
    Row(request=_B.SHARED_OBJECT_ADD, payload=p.SharedObject, needs=_F.SHARED_OBJECT),
    Row(request=_B.SHARED_OBJECT_REMOVE, payload=p.SharedObject, needs=_F.SHARED_OBJECT),
    Row(
        request=_B.SHARED_OBJECT_LOOKUP,
        payload=p.SharedObject,
        reply=p.U64,
        reply_fds=(0, 1),
        needs=_F.SHARED_OBJECT,
    ),
    Row(request=_B.SHMEM_MAP, payload=p.SharedMemoryMap, fds=(1, 1), needs=_F.SHMEM),
    Row(request=_B.SHMEM_UNMAP, payload=p.SharedMemoryMap, needs=_F.SHMEM),
)
"""Every request of a back-end, by its number."""


def render() -> str:
    """Both tables as text, a line for each request, for documentation and for reading a trace."""

    def count(least: int, largest: int) -> str:
        return f"{least}" if least == largest else f"{least} to {largest}"

    lines: list[str] = []
    for title, table in (("front-end to back-end", FRONTEND_REQUESTS), ("back-end to front-end", BACKEND_REQUESTS)):
        lines += [title, "=" * len(title)]
        for number, row in sorted(table.items()):
            reply = "only with NEED_REPLY" if row.reply is None else row.reply.describe()
            needs = "" if row.needs is None else f"; needs {row.needs.name}"
            lines.append(
                f"{number:3} {row.name}: {row.payload.describe()}; fds {count(*row.fds)}; reply: {reply}"
                + (f" and {count(*row.reply_fds)} fds" if row.reply_fds != (0, 0) else "")
                + needs
            )
        lines.append("")
    return "\n".join(lines)
