"""Section 2.14: our driver before a hostile device."""

from __future__ import annotations

from typing import Final

from virtio_test.checks.entry import Outcome

from .row import Meets, row

__all__ = ["DRIVER_ROWS"]

_G: Final = Meets.DRIVER

DRIVER_ROWS: Final = (
    row("G01", _G, "A used id is beyond the queue.", by="UsedIdOutOfRange"),
    row(
        "G02",
        _G,
        "A used id is that of no buffer in flight, or of the middle of a chain.",
        by="UsedIdNotInFlight",
    ),
    row(
        "G04",
        _G,
        "A used length is more than the buffer can take.",
        by="UsedLenTooBig",
        behaviour="`Policy(used_len_beyond=True)` cuts it to what the buffer can take.",
    ),
    row("G05", _G, "The used idx is further ahead than buffers are in flight.", by="UsedIdxTooFar"),
    row("G06", _G, "The used idx goes back.", by="UsedIdxTooFar"),
    row("G08", _G, "One id is used twice.", by="UsedIdNotInFlight"),
    row(
        "G09",
        _G,
        "Interrupts come for nothing: spurious, after a break, before DRIVER_OK, or without an end.",
        Outcome.UNREAD,
        "A line that is never lowered, or has no cause, is a finding.",
        by="InterruptWithoutCause LineNeverLowered",
        clauses="2.7.7.1",
    ),
    row(
        "G10",
        _G,
        "avail_event or used.flags are garbage.",
        Outcome.ACCEPTED,
        "It costs notifications, and nothing waits without a bound.",
        clauses="2.7.10.1",
    ),
    row(
        "G11",
        _G,
        "A packed used descriptor is of another lap, or names nothing in flight.",
        by="UsedIdNotInFlight UsedIdOutOfRange UsedIdxTooFar",
        behaviour="One whose flags do not say used is not taken.",
    ),
    row(
        "G13",
        _G,
        "The device never completes a request.",
        Outcome.FAILED,
        "`PeerTimeout` after a bounded wait; the request stays in flight.",
        clauses="2.4",
    ),
    row(
        "G14",
        _G,
        "DEVICE_NEEDS_RESET is set at any time.",
        Outcome.FAILED,
        "Every request in flight fails once, with `DeviceNeedsReset`; after a reset the driver works again.",
        clauses="2.1.1",
    ),
    row(
        "G15",
        _G,
        "The configuration changes its size or values while it is read, and never stands still.",
        by="ConfigNeverStable ConfigTooShort",
        behaviour="It is read a bounded number of times.",
    ),
    row(
        "G16",
        _G,
        "The device offers an impossible queue size or number of queues.",
        Outcome.RAISED,
        "A size of 0 is no queue.",
        by="QueueSizeMaxTooLarge QueueSizeMaxNoPowerOfTwo TooManyQueues QueueSizeTooBig QueueSizeNotPowerOfTwo "
        "QueueSizeZero BadQueueSize",
    ),
    row(
        "G17",
        _G,
        "FEATURES_OK does not stand, or VERSION_1 is not offered.",
        by="StatusBitLost FeaturesRefused RequiredFeatureMissing Version1NotOffered",
        behaviour="FAILED is set, and the rule is raised.",
    ),
    row(
        "G18",
        Meets.CALLER,
        "Our caller asks for the answer of a request that is not this queue's.",
        Outcome.MISUSE,
        "Tokens are the caller's own objects: one comes back, with its answer, when its buffer is used.",
        clauses="2.7.14 2.8.22",
        differs="Recommended is an error for a wrong token. Used buffers are handed out with their token, so there is "
        "no token to be wrong about.",
    ),
    row(
        "G19",
        Meets.CALLER,
        "A driver is given up while buffers are in flight.",
        Outcome.SAFE,
        "Detaching resets the device first; the memory of a device that does not reset is not used again.",
        clauses="2.4.2 3.3.1",
    ),
)
