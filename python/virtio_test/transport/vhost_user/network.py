"""What a front-end must know of network devices: which of their features are not the back-end's.

vhost-user carries rings, and a network device's control queue is the front-end's own: QEMU and DPDK's virtio-user
answer its commands themselves, and back-ends such as DPDK's offer CTRL_VQ for them, without such a queue. A driver of
ours that accepted it would set up a queue that nobody serves. A back-end has one if it says how many pairs there are
(CONFIG) and has a queue behind the last of them, as ours. Nor can a driver use what the configuration space tells where
the protocol carries none.

Likewise a front-end negotiates with our back-end what it uses, and not the control queue that it keeps for itself: QEMU
accepts GUEST_ANNOUNCE and MQ without CTRL_VQ, which the driver that it serves has accepted from it.
"""

from __future__ import annotations

from typing import Final

from virtio_test.features import Requirements
from virtio_test.spec.ids import DeviceId
from virtio_test.spec.net import FEATURE_NAMES, REQUIRES

__all__ = ["PAIRS_FIELD", "not_ours_to_take", "required_of_a_front_end"]

PAIRS_FIELD: Final = (8, 2)
"""Offset and length of `max_virtqueue_pairs` (VIRTIO 1.4, 5.1.4)."""

_IN_CONFIG: Final = ("MAC", "STATUS", "MTU", "MQ", "GUEST_ANNOUNCE", "RSS", "HASH_REPORT", "SPEED_DUPLEX")
_COMMANDED: Final = (
    "CTRL_VQ",
    "CTRL_RX_EXTRA",
    "CTRL_GUEST_OFFLOADS",
    "DEVICE_STATS",
    *(name for name, needs in REQUIRES.items() if "CTRL_VQ" in needs),
)
"""Features that are used through the control queue."""


def not_ours_to_take(*, queues: int, pairs: int | None) -> int:
    """The feature bits that a driver behind a front-end must not see.

    Args:
        queues: how many virtqueues the back-end has.
        pairs: how many pairs its configuration space shows; None where there is none.
    """
    hidden = _IN_CONFIG if pairs is None else ()
    if pairs is None or queues <= 2 * pairs:
        hidden += _COMMANDED
    return sum(1 << FEATURE_NAMES[name] for name in set(hidden))


def required_of_a_front_end(device_id: int, requires: Requirements) -> Requirements:
    """What features require of those that a front-end accepts, where `requires` says it for drivers."""
    if device_id != DeviceId.NET:
        return requires
    return {name: tuple(need for need in needs if need != "CTRL_VQ") for name, needs in requires.items()}
