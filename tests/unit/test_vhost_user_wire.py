"""The front-end's sockets: what is taken of them and when they are given up; and the back-end's own channel."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import pytest
from virtio_test.errors import MessageError, PeerDisconnected, PeerTimeout
from virtio_test.loop import OwnerLoop
from virtio_test.transport.vhost_user import wire as wires
from virtio_test.transport.vhost_user.channel import BackendChannel
from virtio_test.transport.vhost_user.codec import Decoder, OwnedFd, encode, encode_reply
from virtio_test.transport.vhost_user.messages import BACKEND_REQUESTS, FRONTEND_REQUESTS, BackendRequest, Request
from virtio_test.transport.vhost_user.payloads import U64, Iotlb
from virtio_test.transport.vhost_user.wire import Wire

from .world import PATIENCE, a_fd, open_fds

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


def wire(connection: socket.socket) -> Wire:
    return Wire(connection, Decoder(FRONTEND_REQUESTS, replies=True), timeout=PATIENCE)


def clock(monkeypatch: pytest.MonkeyPatch, times: Iterable[float]) -> None:
    monkeypatch.setattr(wires.time, "monotonic", cast("Any", iter(times).__next__))


REPLY = encode_reply(Request.GET_FEATURES, U64(7))


def test_a_message_that_ends_too_late_is_not_taken(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair[1].sendall(REPLY)
    clock(monkeypatch, [0.0, 0.0, PATIENCE + 0.5, PATIENCE + 0.5, PATIENCE + 0.5])
    with pytest.raises(PeerTimeout, match="did not end its message within 10 s"):
        wire(pair[0]).receive()


def test_a_message_may_end_in_the_last_moment(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair[1].sendall(REPLY)
    clock(monkeypatch, itertools.chain([0.0, 0.0], itertools.repeat(PATIENCE)))
    assert wire(pair[0]).receive().payload == U64(7)


def test_an_answer_that_fits_in_part_or_not_at_all_is_not_left_half(pair: Pair) -> None:
    ours = wire(pair[0])
    ours.answer(REPLY)
    assert pair[1].recv(100) == REPLY
    with pytest.raises(MessageError) as caught:
        ours.answer(bytes(1 << 22))
    assert caught.value.rule == "RepliesUnread"
    with pytest.raises(MessageError):
        ours.answer(REPLY)


def test_who_says_nothing_is_silent_and_who_left_is_gone(pair: Pair) -> None:
    ours = wire(pair[0])
    ours.check_silent()
    pair[1].close()
    with pytest.raises(PeerDisconnected):
        ours.check_silent()


# --- the channel ---------------------------------------------------------------------------------------------------


class Loop:
    """A loop that runs what it is told to."""

    def __init__(self) -> None:
        self.readable: Callable[[], object] = lambda: None
        self.read = list[int]()

    def add_reader(self, fd: int, readable: Callable[[], object]) -> None:
        self.readable = readable
        self.read.append(fd)

    def remove_reader(self, fd: int) -> None:
        self.read.remove(fd)


def channel(pair: Pair) -> tuple[BackendChannel, Loop]:
    loop = Loop()
    return BackendChannel(OwnedFd(os.dup(pair[0].fileno())), cast("OwnerLoop", loop)), loop


def test_only_a_socket_is_a_channel() -> None:
    before, fd = open_fds(), OwnedFd(a_fd())
    with pytest.raises(MessageError) as caught:
        BackendChannel(fd, cast("OwnerLoop", Loop()))
    assert caught.value.rule == "FdType"
    fd.close()  # it is the message's still
    assert open_fds() == before


def test_an_answer_belongs_to_the_page_that_was_asked_for(pair: Pair) -> None:
    ours, loop = channel(pair)
    refused = list[int]()
    ours.on_refused = refused.append
    pages = [0x1000, 0x2000]
    for page in pages:
        ours.miss(Iotlb(page, 4096, 0, 1, 1), need_reply=True)
    decoder = Decoder(BACKEND_REQUESTS)
    asked = list(decoder.feed(pair[1].recv(1000)))
    assert [message.payload.iova for message in asked if isinstance(message.payload, Iotlb)] == pages
    for value in (0, 1):
        pair[1].sendall(encode_reply(BackendRequest.IOTLB_MSG, U64(value)))
        loop.readable()
        loop.readable()
    assert refused == [0x2000]
    assert loop.read
    pair[1].sendall(encode_reply(BackendRequest.IOTLB_MSG, U64(0)))
    loop.readable()
    loop.readable()
    assert not loop.read  # it answered what nobody asked
    ours.close()


def test_a_channel_that_was_closed_in_the_same_turn_reads_nothing(pair: Pair) -> None:
    ours, loop = channel(pair)
    pair[1].sendall(encode(BackendRequest.CONFIG_CHANGE_MSG))
    ours.close()
    loop.readable()
    assert not loop.read
