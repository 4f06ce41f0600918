"""Section 2.13: vhost-user messages, as a back-end gets them."""

from __future__ import annotations

from typing import Final

from virtio_test.checks.entry import Outcome

from .row import Meets, apart, row

__all__ = ["MESSAGE_ROWS"]

_P: Final = Meets.PROTOCOL

MESSAGE_ROWS: Final = (
    row(
        "M01",
        _P,
        "A header has another version, reserved flags, the reply flag, or a size that is not that of its payload.",
        by="BadVersion ReservedFlags ReplyFlag MessageTooLong PayloadSize UnexpectedReply ConfigRange ConfigSize "
        "ConfigFlags StatusValue",
    ),
    row(
        "M02",
        _P,
        "A message is cut off, or comes byte by byte.",
        by="Truncated RepliesUnread",
        behaviour="Bytes are kept until a message is whole; nobody is waited for in a loop.",
    ),
    row("M03", _P, "A message comes with fewer or more fds than it takes.", by="FdCount", behaviour="All are closed."),
    row(
        "M04",
        _P,
        "Features are set that were not offered, or change while rings run.",
        by="FeatureNotOffered FeaturesRefused FeaturesWhileRunning ProtocolFeatureNotOffered InbandAlone",
    ),
    row(
        "M05",
        _P,
        "A memory table has no region, too many, or regions that are empty, wrap, overlap or are not in their file.",
        by="RegionCount RegionSize RegionWrap RegionOverlap RegionFile RegionBeyondFile RegionRefused MemoryLost",
        behaviour="A file that is cut short later is a broken rule of the queue that meets it (`MemoryLost`).",
    ),
    row(
        "M06",
        _P,
        "Regions are added twice or beyond the slots, or one is removed that is not there or in use.",
        by="RegionOverlap RegionSlots RegionUnknown RegionSize",
        behaviour="A region in use may be removed: chains that lie there raise `StaleMemory`.",
        differs="Recommended is an error for a region in use. The protocol allows the removal, and accesses check.",
    ),
    row("M08", _P, "A ring's base is beyond the ring, or has bits that do not exist.", by="VringBase"),
    row(
        "M09",
        _P,
        "Ring addresses are not aligned, not in memory, too early, or have undefined flags.",
        by="VringAddress VringOrder VringFlags VringSize VringValue VringIndex",
    ),
    row(
        "M10",
        _P,
        "A kick, call or err fd is missing, of another kind, closed at its other end, or replaced while it is polled.",
        by="FdType VringValue",
        behaviour="A kick fd that has hung up is not polled any more.",
    ),
    row(
        "M11",
        _P,
        "Messages come in any order.",
        by="VringIndex VringOrder VringValue QueueCount",
        behaviour="A ring runs only when all is there that it needs.",
    ),
    row(
        "M12",
        _P,
        "A ring is stopped by reading its base, and kicked again.",
        Outcome.ACCEPTED,
        "It has drained when the answer goes out, and no kick starts it.",
        clauses="vhost-user:VHOST_USER_GET_VRING_BASE",
    ),
    row(
        "M13",
        _P,
        "The device is reset by RESET_DEVICE or RESET_OWNER in the middle of requests.",
        Outcome.DROPPED,
        "RESET_DEVICE resets all queues. RESET_OWNER, which is deprecated, disables them and no more.",
        clauses="vhost-user:VHOST_USER_RESET_DEVICE",
    ),
    row(
        "M15",
        _P,
        "A dirty log is empty, has an impossible offset, or is smaller than the memory.",
        by="LogRange LogFile LogTooSmall NotNegotiated VringFlags",
        behaviour="SET_LOG_BASE has an answer of its own, which cannot say so: the connection ends.",
    ),
    row(
        "M16",
        _P,
        "A request asks for an acknowledgement, or is unknown.",
        by="UnknownRequest NotNegotiated NotSupported Refused DeviceFailed",
        behaviour="What asks is answered, other than 0 where nothing was done; unknown ones that do not are ignored.",
    ),
    row(
        "M17",
        _P,
        "IOTLB messages wrap, overlap, have other permissions, or come without an end.",
        by="IotlbRange IotlbPermission IotlbAddress IotlbType NotNegotiated",
        behaviour="Answered with 1, and nothing is changed. Entries are a cache of 4096, misses at most 64 at a time; "
        "an entry over others takes their place.",
    ),
    apart("M19", "A crypto session has impossible key lengths.", "no device here has crypto sessions: `NotSupported`"),
    row(
        "M20",
        _P,
        "A second front-end connects, or one leaves in the middle of requests and comes back.",
        Outcome.ACCEPTED,
        "The second waits for its turn. Nothing of one is seen by the next, but for the record of what is in flight.",
        by="InflightRegion InflightState",
    ),
    row(
        "M21",
        _P,
        "Ten thousand messages are refused that carry fds.",
        Outcome.SAFE,
        "As many fds are open as before.",
        clauses="vhost-user:Communication",
    ),
)
