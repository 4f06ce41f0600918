"""Messages of a back-end that are legal by their form and wrong at that moment: refused, and nothing changes."""

from __future__ import annotations

from pathlib import Path

import pytest
from virtio_test.transport.vhost_user.messages import ProtocolFeature, Request
from virtio_test.transport.vhost_user.payloads import U64, Inflight, VringState
from virtio_test.transport.vhost_user.session import SUPPORTED

from tests.unit.vhost_user_world import guest, serving
from tests.unit.world import open_fds


@pytest.mark.row("M16", "M11")
@pytest.mark.parametrize("number", [1, 0x100, 0xFFFF_FFFF])
def test_an_in_band_kick_that_carries_something(tmp_path: Path, number: int) -> None:
    with (
        serving(tmp_path / "s", protocol_features=SUPPORTED) as server,
        guest(server.path, protocol_features=SUPPORTED) as g,
    ):
        g.front.open_channel()
        g.setup()
        g.front.enable(0)
        g.front.send(Request.VRING_KICK, VringState(0, number), need_reply=True)
        assert g.front.receive().payload == U64(1)
        g.request(1)


@pytest.mark.row("M20", "M11")
def test_a_record_that_comes_while_rings_run(tmp_path: Path) -> None:
    with serving(tmp_path / "s") as server, guest(server.path) as g:
        assert g.front.protocol & ProtocolFeature.INFLIGHT_SHMFD
        region = g.front.get_inflight(1, 128, packed=False)
        g.front.set_inflight(region)
        g.setup()
        g.front.enable(0)
        g.request(1)
        before = open_fds()
        told = Inflight(region.size, region.offset, region.queues, region.queue_size)
        g.front.send(Request.SET_INFLIGHT_FD, told, [region.fileno()], need_reply=True)
        assert g.front.receive().payload == U64(1)
        assert open_fds() == before
        g.request(2)
        region.close()
