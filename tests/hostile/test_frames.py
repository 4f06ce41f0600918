"""fds beside a message that is not whole yet: too many are refused at once, and none of any message stays."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from virtio_test.carrier.vfio_user import codec as vfio_codec
from virtio_test.carrier.vfio_user.messages import MAX_FDS as VFIO_FDS
from virtio_test.carrier.vfio_user.messages import Command
from virtio_test.carrier.vfio_user.payloads import DmaMap
from virtio_test.errors import MessageError
from virtio_test.sockets.frames import FrameDecoder
from virtio_test.transport.vhost_user import codec as vhost_codec
from virtio_test.transport.vhost_user.messages import FRONTEND_REQUESTS, Request
from virtio_test.transport.vhost_user.messages import MAX_FDS as VHOST_FDS
from virtio_test.transport.vhost_user.payloads import MemoryRegion, MemoryTable

Made = tuple[Callable[[], FrameDecoder[object, object]], bytes, int]


def vhost() -> Made:
    data = vhost_codec.encode(Request.SET_MEM_TABLE, MemoryTable((MemoryRegion(0, 4096, 0, 0),)))
    return lambda: vhost_codec.Decoder(FRONTEND_REQUESTS), data, VHOST_FDS  # type: ignore[return-value]


def vfio() -> Made:
    data = vfio_codec.encode(Command.DMA_MAP, 1, DmaMap(32, 3, 0, 0, 4096))
    return lambda: vfio_codec.Decoder("server"), data, VFIO_FDS  # type: ignore[return-value]


def opened(count: int) -> list[int]:
    return [os.open("/dev/null", os.O_RDONLY) for _ in range(count)]


def closed(fds: list[int]) -> bool:
    return not any(Path(f"/proc/self/fd/{fd}").exists() for fd in fds)


@pytest.mark.row("M03", "CVE-2019-14818")
@pytest.mark.parametrize("made", [vhost, vfio])
def test_more_fds_than_a_message_can_have_are_refused_before_it_is_whole(made: Callable[[], Made]) -> None:
    make, data, most = made()
    decoder = make()
    fds = opened(most + 1)
    with pytest.raises(MessageError, match="FdCount"):
        list(decoder.feed(data[:1], fds))
    assert closed(fds)
    assert not decoder.pending


@pytest.mark.row("M03", "CVE-2019-14818")
@pytest.mark.parametrize("made", [vhost, vfio])
def test_as_many_as_a_message_can_have_wait_for_its_end(made: Callable[[], Made]) -> None:
    make, data, most = made()
    decoder = make()
    fds = opened(most)
    assert list(decoder.feed(data[:1], fds)) == []
    assert not closed(fds[:1])
    with pytest.raises(MessageError, match="Truncated"):
        decoder.end()
    assert closed(fds)


@pytest.mark.row("M03")
@pytest.mark.parametrize("made", [vhost, vfio])
def test_fds_that_were_cut_off_end_the_connection(made: Callable[[], Made]) -> None:
    """The kernel had no room for all that came: those that did are not what the message says they are."""
    make, data, _ = made()
    decoder = make()
    fds = opened(1)
    with pytest.raises(MessageError, match="FdCount"):
        list(decoder.feed(data, fds, cut=True))
    assert closed(fds)
