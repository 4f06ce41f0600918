"""Answers of a front-end with an IOMMU that come beside the entries that they are about."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from virtio_test._core import DriverQueue
from virtio_test.devices.test import TestDevice
from virtio_test.features import FeatureSet
from virtio_test.transport.vhost_user.codec import encode, encode_reply
from virtio_test.transport.vhost_user.frontend import USER_OFFSET
from virtio_test.transport.vhost_user.messages import HEADER_BYTES, BackendRequest, IotlbType, Request
from virtio_test.transport.vhost_user.payloads import U64, Iotlb

from .test_vhost_user_iotlb import ANSWERED, ASKED, PAGE, READ, behind
from .vhost_user_world import REQUEST, serving
from .world import PATIENCE, eventually


@pytest.mark.row("B16")
def test_a_refusal_of_what_came_already_breaks_nothing(tmp_path: Path) -> None:
    """A page was asked for to write, then to read; it comes to read alone, and in the same turn it is refused."""
    device = TestDevice(console=lambda _: None)
    server = serving(tmp_path / "s", device, features=device.features | FeatureSet("ACCESS_PLATFORM"))
    with server as served, behind(served.path) as b:
        b.map_ring()
        b.map(ASKED)
        b.map(2 * ASKED - PAGE)
        b.enable()
        b.queue.add([(ASKED, 48)], [(ANSWERED, 12)])
        b.queue.publish()
        b.ring.kick.notify()
        assert b.front.channel is not None
        channel = b.front.channel

        def asked() -> bool:
            message = channel.take()
            return message is not None and isinstance(message.payload, Iotlb) and message.payload.iova == ANSWERED

        assert eventually(asked)
        b.front.get_base(0)
        b.queue = DriverQueue(b.memory, b.config)
        b.ring = b.front.setup_ring(b.config)
        b.memory.write(ANSWERED, REQUEST.pack(1, 2, 3, 4, b"hello back end!"))
        token = b.queue.add([(ANSWERED, 48)], [(2 * ASKED - PAGE, 12)])
        b.queue.publish()
        b.ring.kick.notify()
        assert eventually(asked)
        entry = Iotlb(ANSWERED, PAGE, ANSWERED + USER_OFFSET, int(READ), int(IotlbType.UPDATE))
        update = encode(Request.IOTLB_MSG, entry, need_reply=True)
        refusal = encode_reply(BackendRequest.IOTLB_MSG, U64(1))
        # In one turn of the loop it reads the start of both, in the next their ends.
        for part in (slice(HEADER_BYTES), slice(HEADER_BYTES, None)):
            held, go = threading.Event(), threading.Event()

            def hold(held: threading.Event = held, go: threading.Event = go) -> None:
                held.set()
                go.wait(PATIENCE)

            served.loop.call_soon(hold)
            assert held.wait(PATIENCE)
            b.front.send_bytes(update[part])
            channel.socket.sendall(refusal[part])
            go.set()
        assert b.front.receive().request == Request.IOTLB_MSG
        assert eventually(b.queue.has_used)
        assert b.queue.get_used() == (token, 12)
        assert not b.broken
