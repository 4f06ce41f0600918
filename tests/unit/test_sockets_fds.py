"""fds beside bytes, over a real socket: all of them come, or it is said that they did not."""

from __future__ import annotations

import os
import resource
import socket
import struct
import time
from collections.abc import Generator
from contextlib import contextmanager

import pytest
from virtio_test.carrier.vfio_user import wire as vfio_user
from virtio_test.carrier.vfio_user.codec import encode
from virtio_test.carrier.vfio_user.messages import Command
from virtio_test.carrier.vfio_user.payloads import DmaMap
from virtio_test.errors import MessageError
from virtio_test.sockets.fds import EVENTFD, OwnedFd, kernel_name, receive, send
from virtio_test.transport.vhost_user.codec import Decoder, encode_reply
from virtio_test.transport.vhost_user.messages import FRONTEND_REQUESTS, Request
from virtio_test.transport.vhost_user.payloads import Inflight
from virtio_test.transport.vhost_user.wire import Wire

from .world import PATIENCE, a_fd, open_fds

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Generator[Pair]:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with one, other:
        before = open_fds()
        yield one, other
        assert open_fds() == before


@contextmanager
def room_for(fds: int) -> Generator[None]:
    """So many fds can be opened inside, and no more."""
    free = [a_fd() for _ in range(fds + 1)]
    for fd in free:
        os.close(fd)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[-1], limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize(("sent", "room"), [(0, 0), (3, 3), (253, 253), (3, 2), (1, 0), (253, 5)])
def test_what_could_not_be_taken_is_told(pair: Pair, sent: int, room: int) -> None:
    given = OwnedFd(a_fd())
    assert send(pair[0], b"abc", [given.fileno()] * sent, 0) == 3
    given.close()
    with room_for(room):
        data, fds, cut = receive(pair[1], 2)
    assert (data, len(fds), cut) == (b"ab", room, room < sent)
    assert not any(os.get_inheritable(fd) for fd in fds)
    for fd in fds:
        os.close(fd)
    # The fds came with the first byte.
    data, fds, cut = receive(pair[1], 2)
    assert (data, len(fds), cut) == (b"c", 0, False)


def test_a_front_end_misses_the_fd_that_it_had_no_room_for(pair: Pair) -> None:
    wire = Wire(pair[0], Decoder(FRONTEND_REQUESTS, replies=True), timeout=PATIENCE)
    send(pair[1], encode_reply(Request.GET_INFLIGHT_FD, Inflight(4096, 0, 1, 64)), [pair[1].fileno()], 0)
    with room_for(0), pytest.raises(MessageError, match=r"FdCount.* more fds came than could be taken"):
        wire.receive()


def test_a_server_misses_the_fd_that_it_had_no_room_for(pair: Pair) -> None:
    wire = vfio_user.Wire(pair[0], "server")
    # Memory without an fd is memory that the client withholds: the loss would be another meaning.
    send(pair[1], encode(Command.DMA_MAP, 1, DmaMap(32, 3, 0, 0, 4096)), [pair[1].fileno()], 0)
    with room_for(0), pytest.raises(MessageError, match=r"FdCount.* more fds came than could be taken"):
        wire.receive()


@pytest.mark.parametrize("fds", [0, 1])
def test_flags_hold_with_fds_and_without(pair: Pair, fds: int) -> None:
    given = OwnedFd(a_fd())
    # Without the flag it would wait, for ever but for this.
    pair[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 5, 0))
    begin = time.monotonic()
    with pytest.raises(BlockingIOError):
        sum(send(pair[0], bytes(1 << 16), [given.fileno()] * fds, socket.MSG_DONTWAIT) for _ in range(1000))
    assert time.monotonic() < begin + 5


def test_the_kernel_names_an_eventfd() -> None:
    eventfd, null = OwnedFd(os.eventfd(0)), OwnedFd(a_fd())
    assert kernel_name(eventfd.fileno()) == EVENTFD
    assert kernel_name(null.fileno()) == "/dev/null"
