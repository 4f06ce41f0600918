"""The codec: any cut of the stream gives the same messages, and no malformed message keeps an fd."""

from __future__ import annotations

import itertools
import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtio_test.errors import MessageError
from virtio_test.transport.vhost_user.codec import Decoder, Message, OwnedFd, Unknown, encode, encode_reply
from virtio_test.transport.vhost_user.messages import (
    BACKEND_REQUESTS,
    FRONTEND_REQUESTS,
    MAX_FDS,
    MAX_PAYLOAD,
    BackendRequest,
    Request,
)
from virtio_test.transport.vhost_user.payloads import (
    U64,
    Config,
    Empty,
    MemoryRegion,
    MemoryTable,
    VringState,
)

from .world import a_fd, open_fds


def header(request: int, flags: int, size: int) -> bytes:
    return struct.pack("=III", request, flags, size)


def decode(data: bytes, fds: list[int] | None = None, *, decoder: Decoder | None = None) -> list[Message]:
    return list((decoder or Decoder(FRONTEND_REQUESTS)).feed(data, fds or []))


STREAM = (
    encode(Request.SET_OWNER)
    + encode(Request.SET_VRING_NUM, VringState(1, 256), need_reply=True)
    + encode(Request.GET_CONFIG, Config(0, 3, 0, b"abc"))
    + encode(Request.SET_FEATURES, U64(1 << 32))
)
EXPECTED = [
    Message(Request.SET_OWNER, Empty()),
    Message(Request.SET_VRING_NUM, VringState(1, 256), need_reply=True),
    Message(Request.GET_CONFIG, Config(0, 3, 0, b"abc")),
    Message(Request.SET_FEATURES, U64(1 << 32)),
]


@given(st.lists(st.integers(0, len(STREAM))))
def test_any_cut_of_the_stream_gives_the_same_messages(cuts: list[int]) -> None:
    decoder = Decoder(FRONTEND_REQUESTS)
    places = [0, *sorted(cuts), len(STREAM)]
    found = [message for start, end in itertools.pairwise(places) for message in decoder.feed(STREAM[start:end])]
    assert found == EXPECTED
    assert not decoder.pending
    decoder.end()


def test_reading_what_is_wanted_never_reads_beyond_a_message() -> None:
    decoder = Decoder(FRONTEND_REQUESTS)
    at = 0
    found: list[Message] = []
    parts: list[int] = []
    while at < len(STREAM):
        parts.append(decoder.wanted)
        new = list(decoder.feed(STREAM[at : at + parts[-1]]))
        assert len(new) <= 1
        at += parts[-1]
        found += new
    assert found == EXPECTED
    assert parts == [12, 12, 8, 12, 15, 12, 8]


@pytest.mark.parametrize("number", range(1, len(STREAM)))
def test_a_stream_that_ends_in_a_message_is_truncated(number: int) -> None:
    decoder = Decoder(FRONTEND_REQUESTS)
    whole = {len(encode(Request.SET_OWNER)), 32, 59}
    list(decoder.feed(STREAM[:number]))
    if number in whole:
        decoder.end()
        return
    with pytest.raises(MessageError) as caught:
        decoder.end()
    assert caught.value.rule == "Truncated"


MALFORMED = [
    ("BadVersion", header(1, 0, 0)),
    ("BadVersion", header(1, 2, 0)),
    ("BadVersion", header(1, 3, 0)),
    ("ReservedFlags", header(1, 0x11, 0)),
    ("ReservedFlags", header(1, 0x8000_0001, 0)),
    ("ReplyFlag", header(1, 0x5, 0)),
    ("MessageTooLong", header(1, 1, 4097)),
    ("MessageTooLong", header(99, 1, 0xFFFF_FFFF)),
    ("PayloadSize", header(1, 1, 1)),
    ("PayloadSize", header(2, 1, 7)),
    ("PayloadSize", header(2, 1, 9)),
    ("PayloadSize", header(5, 1, 264 + 32)),
    ("PayloadSize", header(5, 1, 12) + bytes(12)),
    ("PayloadSize", header(5, 1, 40) + struct.pack("=II", 2, 0) + bytes(32)),
    ("PayloadSize", header(24, 1, 12) + struct.pack("=III", 0, 1, 0)),
    ("PayloadSize", header(24, 1, 11)),
]


@pytest.mark.parametrize(("rule", "data"), MALFORMED)
def test_a_malformed_message_is_named_and_kills_the_stream(rule: str, data: bytes) -> None:
    decoder = Decoder(FRONTEND_REQUESTS)
    before = open_fds()
    with pytest.raises(MessageError) as caught:
        list(decoder.feed(data, [a_fd(), a_fd()]))
    assert caught.value.rule == rule
    assert open_fds() == before
    assert list(decoder.feed(encode(Request.SET_OWNER), [a_fd()])) == []
    assert open_fds() == before


def test_a_bad_header_is_refused_before_its_payload_is_awaited() -> None:
    with pytest.raises(MessageError):
        decode(header(2, 1, 4096))


def test_messages_before_a_malformed_one_come_out_first() -> None:
    found: list[Message] = []
    stream = Decoder(FRONTEND_REQUESTS).feed(encode(Request.SET_OWNER) + header(1, 0, 0))
    with pytest.raises(MessageError) as caught:
        found.extend(stream)
    assert caught.value.rule == "BadVersion"
    assert found == [Message(Request.SET_OWNER)]


TABLE = MemoryTable((MemoryRegion(0, 4096, 0, 0), MemoryRegion(4096, 4096, 4096, 0)))


@pytest.mark.parametrize(
    ("data", "count", "good"),
    [
        (encode(Request.SET_OWNER), 0, True),
        (encode(Request.SET_OWNER), 1, False),
        (encode(Request.SET_VRING_KICK, U64(0)), 1, True),
        (encode(Request.SET_VRING_KICK, U64(0)), 0, False),
        (encode(Request.SET_VRING_KICK, U64(0)), 2, False),
        (encode(Request.SET_VRING_CALL, U64(0x100)), 0, True),
        (encode(Request.SET_VRING_CALL, U64(0x100)), 1, False),
        (encode(Request.SET_BACKEND_REQ_FD), 0, False),
        (encode(Request.SET_BACKEND_REQ_FD), 1, True),
        (encode(Request.SET_MEM_TABLE, TABLE), 1, False),
        (encode(Request.SET_MEM_TABLE, TABLE), 2, True),
        (encode(Request.SET_MEM_TABLE, TABLE), 3, False),
        (encode(Request.SET_MEM_TABLE, TABLE), 9, False),
        (encode(Request.SET_MEM_TABLE, TABLE), 32, False),
        (encode(Request.SET_MEM_TABLE, TABLE), MAX_FDS + 1, False),
        (encode(Request.GET_FEATURES), 1, False),
    ],
)
def test_fds_are_counted(data: bytes, count: int, *, good: bool) -> None:
    before = open_fds()
    fds = [a_fd() for _ in range(count)]
    if good:
        (message,) = decode(data, fds)
        assert [fd.fileno() for fd in message.fds] == fds
        assert open_fds() == before + count
        del message
    else:
        with pytest.raises(MessageError) as caught:
            decode(data, fds)
        assert caught.value.rule == "FdCount"
    assert open_fds() == before


def test_fds_go_with_the_message_that_they_came_with() -> None:
    decoder = Decoder(FRONTEND_REQUESTS)
    data = encode(Request.SET_VRING_KICK, U64(3))
    first, second = a_fd(), a_fd()
    assert list(decoder.feed(data[:1], [first])) == []
    (one,) = decoder.feed(data[1:])
    (two,) = decoder.feed(data, [second])
    assert [fd.fileno() for fd in (*one.fds, *two.fds)] == [first, second]


def test_the_fds_of_a_message_that_never_ended_are_closed() -> None:
    before = open_fds()
    decoder = Decoder(FRONTEND_REQUESTS)
    assert list(decoder.feed(b"\x0c", [a_fd()])) == []
    with pytest.raises(MessageError):
        decoder.end()
    assert open_fds() == before
    decoder = Decoder(FRONTEND_REQUESTS)
    assert list(decoder.feed(b"\x0c", [a_fd()])) == []
    del decoder
    assert open_fds() == before


def test_ten_thousand_malformed_messages_leave_no_fd() -> None:
    before = open_fds()
    for number in range(10_000):
        _, data = MALFORMED[number % len(MALFORMED)]
        with pytest.raises(MessageError):
            decode(data, [a_fd(), a_fd()])
    assert open_fds() == before


def test_an_unknown_request_is_a_message_whose_fds_are_closed() -> None:
    before = open_fds()
    (message,) = decode(header(77, 0x9, 3) + b"abc", [a_fd()])
    assert message == Message(77, Unknown(b"abc"), need_reply=True)
    assert open_fds() == before


def test_the_longest_payload_that_may_be() -> None:
    (found,) = decode(header(100, 1, MAX_PAYLOAD) + bytes(MAX_PAYLOAD))
    assert isinstance(found.payload, Unknown)
    with pytest.raises(MessageError) as caught:
        decode(header(100, 1, MAX_PAYLOAD + 1))
    assert caught.value.rule == "MessageTooLong"


def test_replies_are_decoded_by_the_same_table() -> None:
    decoder = Decoder(FRONTEND_REQUESTS, replies=True)
    data = (
        encode_reply(Request.GET_FEATURES, U64(5))
        + encode_reply(Request.SET_VRING_NUM, U64(0))
        + encode_reply(Request.GET_CONFIG, Config(0, 1, 0, b"x"))
        + encode_reply(Request.GET_CONFIG)
    )
    assert decode(data, decoder=decoder) == [
        Message(Request.GET_FEATURES, U64(5), reply=True),
        Message(Request.SET_VRING_NUM, U64(0), reply=True),
        Message(Request.GET_CONFIG, Config(0, 1, 0, b"x"), reply=True),
        Message(Request.GET_CONFIG, Empty(), reply=True),
    ]
    for wrong, rule in (
        (encode(Request.GET_FEATURES), "ReplyFlag"),
        (encode_reply(Request.GET_FEATURES), "PayloadSize"),
        (encode_reply(Request.SET_VRING_NUM), "PayloadSize"),
    ):
        with pytest.raises(MessageError) as caught:
            decode(wrong, decoder=Decoder(FRONTEND_REQUESTS, replies=True))
        assert caught.value.rule == rule


def test_requests_of_the_back_end_have_their_own_table() -> None:
    decoder = Decoder(BACKEND_REQUESTS)
    data = encode(BackendRequest.CONFIG_CHANGE_MSG) + encode(BackendRequest.VRING_CALL, VringState(1), need_reply=True)
    assert decode(data, decoder=decoder) == [
        Message(BackendRequest.CONFIG_CHANGE_MSG, Empty()),
        Message(BackendRequest.VRING_CALL, VringState(1, 0), need_reply=True),
    ]


@given(st.binary(max_size=200), st.lists(st.integers(1, 60), max_size=20))
def test_arbitrary_bytes_give_messages_or_one_error(data: bytes, steps: list[int]) -> None:
    decoder = Decoder(FRONTEND_REQUESTS)
    errors = 0
    for step in steps or [len(data) or 1]:
        part, data = data[:step], data[step:]
        try:
            list(decoder.feed(part))
        except MessageError:
            errors += 1
    assert errors <= 1


def test_an_owned_fd_closes_once_and_can_be_taken() -> None:
    before = open_fds()
    owned = OwnedFd(a_fd())
    assert open_fds() == before + 1
    owned.close()
    owned.close()
    assert (open_fds(), owned.fileno()) == (before, -1)
    taken = OwnedFd(a_fd()).take()
    assert open_fds() == before + 1
    os.close(taken)
