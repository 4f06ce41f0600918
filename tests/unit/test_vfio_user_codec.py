"""The vfio-user codec: any cut of the stream gives the same messages, and no malformed message keeps an fd."""

from __future__ import annotations

import itertools
import os
import struct
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtio_test.carrier.vfio_user.capabilities import Capabilities, pack_capabilities, parse_capabilities
from virtio_test.carrier.vfio_user.codec import Decoder, Message, OwnedFd, Unknown, encode, encode_error, encode_reply
from virtio_test.carrier.vfio_user.messages import (
    COMMANDS,
    HEADER_BYTES,
    MAX_FDS,
    MAX_MESSAGE,
    Command,
    IrqSet,
    Row,
    render,
)
from virtio_test.carrier.vfio_user.payloads import (
    DmaData,
    DmaMap,
    DmaWritten,
    Empty,
    Payload,
    RegionAccess,
    RegionData,
    SetIrqs,
    Tailed,
    Version,
    WriteMulti,
    WriteOne,
)
from virtio_test.carrier.vfio_user.rules import MESSAGE_RULES, violation
from virtio_test.errors import MessageError

from .world import a_fd, open_fds

ROWS = list(COMMANDS.values())
KINDS = sorted({row.payload for row in ROWS} | {row.reply for row in ROWS}, key=lambda kind: kind.__name__)
FROM_CLIENT = [row for row in ROWS if not row.from_server]


def header(number: int, command: int, size: int, flags: int = 0, errno: int = 0) -> bytes:
    return struct.pack("=HHIII", number, command, size, flags, errno)


def decode(data: bytes, fds: list[int] | None = None, *, decoder: Decoder | None = None) -> list[Message]:
    return list((decoder or Decoder("server")).feed(data, fds or []))


@st.composite
def payloads(draw: st.DrawFn, kind: type[Payload]) -> Payload:
    """Any payload of a class, with tails that are not long."""
    if kind is WriteMulti:
        one = st.builds(
            WriteOne,
            st.integers(0, 2**64 - 1),
            st.integers(0, 2**32 - 1),
            st.integers(0, 8),
            st.binary(min_size=8, max_size=8),
        )
        return WriteMulti(tuple(draw(st.lists(one, max_size=5))))
    codes = [code for code in kind.CODES if code.isalpha()]
    widths = {"H": 16, "I": 32, "Q": 64}
    values: list[Any] = [draw(st.integers(0, 2 ** widths[code] - 1)) for code in codes]
    if issubclass(kind, Tailed):
        values.append(draw(st.binary(max_size=min(kind.MOST, 64))))
    return kind(*values)


# --- the table ------------------------------------------------------------------------------------------------


def test_every_command_has_one_row() -> None:
    assert set(COMMANDS) == set(Command) == {*range(1, 14), *range(15, 19)}
    assert all(number == row.command for number, row in COMMANDS.items())
    assert {row.command for row in ROWS if row.from_server} == {Command.DMA_READ, Command.DMA_WRITE}


def test_the_sizes_are_those_of_the_document() -> None:
    sizes = {
        Command.DMA_MAP: (32, 32),
        Command.DEVICE_GET_REGION_INFO: (32, 32 + 4096),
        Command.DEVICE_GET_IRQ_INFO: (16, 16),
        Command.REGION_READ: (16, 16),
        Command.REGION_WRITE: (16, 16 + (1 << 20)),
        Command.DMA_READ: (16, 16),
        Command.DEVICE_RESET: (0, 0),
    }
    assert {command: COMMANDS[command].payload.sizes() for command in sizes} == sizes
    assert max(row.payload.sizes()[1] for row in ROWS) + HEADER_BYTES <= MAX_MESSAGE
    assert max(row.reply.sizes()[1] for row in ROWS) + HEADER_BYTES <= MAX_MESSAGE


def test_the_table_renders_every_command_once() -> None:
    text = render()
    for row in ROWS:
        assert text.count(f" {row.name}: ") == 1
    assert "argsz u32, flags u32, offset u64, address u64, size u64" in text


def test_every_rule_says_where_it_stands() -> None:
    error = violation("DmaExists", "twice")
    assert str(error) == ("DmaExists (vfio-user, VFIO_USER_DMA_MAP): twice; expected: No region is mapped over another")
    assert all(rule.name == name and rule.summary and rule.section for name, rule in MESSAGE_RULES.items())


# --- round trips ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@given(st.data())
def test_a_payload_comes_back_as_it_was(kind: type[Payload], data: st.DataObject) -> None:
    payload = data.draw(payloads(kind))
    packed = payload.pack()
    least, largest = kind.sizes()
    assert least <= len(packed) <= largest
    assert kind.parse(packed) == payload
    assert eval(repr(payload), {**{k.__name__: k for k in KINDS}, "WriteOne": WriteOne}) == payload


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
@given(st.data())
def test_commands_and_replies_come_back_as_they_were(row: Row, data: st.DataObject) -> None:
    number, no_reply = data.draw(st.integers(0, 0xFFFF)), data.draw(st.booleans())
    sent, answer = data.draw(payloads(row.payload)), data.draw(payloads(row.reply))
    here, there = ("client", "server") if row.from_server else ("server", "client")
    if row.fd_counts is not None:
        sent = SetIrqs(20, IrqSet.DATA_NONE | IrqSet.MASK, 0, 0, 1)
    (command,) = decode(encode(row.command, number, sent, no_reply=no_reply), decoder=Decoder(here))
    assert command == Message(number, row.command, sent, no_reply=no_reply)
    (reply,) = decode(encode_reply(row.command, number, answer), decoder=Decoder(there))
    assert reply == Message(number, row.command, answer, reply=True)
    errno = data.draw(st.integers(0, 2**32 - 1))
    (failed,) = decode(encode_error(row.command, number, errno), decoder=Decoder(there))
    assert failed == Message(number, row.command, Empty(), reply=True, errno=errno)


STREAM = (
    encode(Command.VERSION, 1, Version(0, 0, b"{}\0"))
    + encode(Command.DEVICE_RESET, 2)
    + encode(Command.REGION_WRITE, 3, RegionData(16, 4, 3, b"abc"), no_reply=True)
    + encode_reply(Command.DMA_WRITE, 4, DmaWritten(4096, 7))
    + encode_error(Command.DMA_READ, 5, 14)
    + encode(14, 6, Version(1, 2, b"xy"))
)
EXPECTED = [
    Message(1, Command.VERSION, Version(0, 0, b"{}\0")),
    Message(2, Command.DEVICE_RESET),
    Message(3, Command.REGION_WRITE, RegionData(16, 4, 3, b"abc"), no_reply=True),
    Message(4, Command.DMA_WRITE, DmaWritten(4096, 7), reply=True),
    Message(5, Command.DMA_READ, reply=True, errno=14),
    Message(6, 14, Unknown(b"\1\0\2\0xy")),
]


@given(st.lists(st.integers(0, len(STREAM))))
def test_any_cut_of_the_stream_gives_the_same_messages(cuts: list[int]) -> None:
    decoder = Decoder("server")
    places = [0, *sorted(cuts), len(STREAM)]
    found = [message for start, end in itertools.pairwise(places) for message in decoder.feed(STREAM[start:end])]
    assert found == EXPECTED
    assert not decoder.pending
    decoder.end()


def test_reading_what_is_wanted_never_reads_beyond_a_message() -> None:
    decoder = Decoder("server")
    at = 0
    found: list[Message] = []
    while at < len(STREAM):
        wanted = decoder.wanted
        assert wanted > 0
        new = list(decoder.feed(STREAM[at : at + wanted]))
        assert len(new) <= 1
        at += wanted
        found += new
    assert found == EXPECTED


def test_some_send_the_count_of_a_dma_write_reply_as_eight_bytes() -> None:
    data = header(9, Command.DMA_WRITE, 32, 1) + struct.pack("=QQ", 4096, 7)
    assert [message.payload for message in decode(data)] == [DmaWritten(4096, 7)]


# --- fds ------------------------------------------------------------------------------------------------------


def test_fds_belong_to_the_message_that_they_came_with() -> None:
    before = open_fds()
    asked = SetIrqs(20, IrqSet.DATA_EVENTFD | IrqSet.TRIGGER, 2, 0, 3)
    stream = encode(Command.DMA_MAP, 1, DmaMap(32, 3, 0, 0, 4096)) + encode(Command.DEVICE_SET_IRQS, 2, asked)
    decoder = Decoder("server")
    first = decode(stream[:20], [a_fd()], decoder=decoder) + decode(stream[20:48], decoder=decoder)
    second = decode(stream[48:64], [a_fd(), a_fd()], decoder=decoder) + decode(stream[64:], [a_fd()], decoder=decoder)
    assert [len(message.fds) for message in first + second] == [1, 3]
    assert open_fds() == before + 4
    for message in first + second:
        message.close()
    assert open_fds() == before


@pytest.mark.parametrize(
    ("data", "count"),
    [
        (encode(Command.DEVICE_RESET, 1), 1),
        (encode(Command.DMA_MAP, 1, DmaMap(32, 3, 0, 0, 4096)), 2),
        (encode(Command.DMA_MAP, 1, DmaMap(32, 3, 0, 0, 4096)), MAX_FDS + 1),
        (encode(Command.DEVICE_SET_IRQS, 1, SetIrqs(20, 36, 2, 0, 3)), 2),
        (encode(Command.DEVICE_SET_IRQS, 1, SetIrqs(20, 33, 2, 0, 1)), 1),
        (encode(Command.DEVICE_SET_IRQS, 1, SetIrqs(20, 36, 2, 0, 0xFFFF_FFFF)), 16),
        (encode_reply(Command.DMA_READ, 1, DmaData(0, 0)), 1),
        (encode_error(Command.DMA_READ, 1, 5), 1),
    ],
)
def test_another_number_of_fds_is_refused_and_all_are_closed(data: bytes, count: int) -> None:
    before = open_fds()
    with pytest.raises(MessageError) as found:
        decode(data, [a_fd() for _ in range(count)])
    assert found.value.rule == "FdCount"
    assert open_fds() == before


def test_fds_of_an_unknown_command_are_closed() -> None:
    before = open_fds()
    (message,) = decode(encode(99, 1), [a_fd()])
    assert message.fds == ()
    assert open_fds() == before


def test_an_fd_is_closed_once_and_with_its_owner() -> None:
    fd = OwnedFd(a_fd())
    number = fd.fileno()
    del fd
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


# --- what is malformed ----------------------------------------------------------------------------------------

MALFORMED = [
    ("MessageType", header(1, 13, 16, 2)),
    ("MessageType", header(1, 13, 16, 0xF)),
    ("ReservedFlags", header(1, 13, 16, 0x40)),
    ("ReservedFlags", header(1, 13, 16, 0x8000_0000)),
    ("ReservedFlags", header(1, 13, 16, 0x20)),
    ("ReservedFlags", header(1, 11, 16, 0x11)),
    ("MessageTooLong", header(1, 10, MAX_MESSAGE + 1)),
    ("MessageTooLong", header(1, 999, 0xFFFF_FFFF)),
    ("MessageSize", header(1, 13, 15)),
    ("MessageSize", header(1, 13, 0)),
    ("MessageSize", header(1, 999, 0)),
    ("MessageSize", header(1, 13, 17)),
    ("MessageSize", header(1, 2, 16 + 31)),
    ("MessageSize", header(1, 2, 16 + 33)),
    ("MessageSize", header(1, 1, 16 + 3)),
    ("MessageSize", header(1, 1, 1 << 20)),
    ("MessageSize", header(1, 11, 17, 0x21)),
    ("MessageSize", encode(15, 1, WriteMulti(()))[:16] + struct.pack("=Q", 1)),
    ("MessageSize", encode(15, 1, WriteMulti(()))[:16] + struct.pack("=Q", 1 << 63)),
    ("Direction", header(1, 11, 32)),
    ("Direction", header(1, 9, 16, 0x21)),
    ("UnexpectedReply", header(1, 14, 16, 1)),
]


@pytest.mark.parametrize(("rule", "data"), MALFORMED)
def test_a_malformed_message_is_named_and_its_fds_are_closed(rule: str, data: bytes) -> None:
    before = open_fds()
    decoder = Decoder("server")
    with pytest.raises(MessageError) as found:
        decode(data, [a_fd()], decoder=decoder)
    assert found.value.rule == rule
    assert found.value.clause == f"vfio-user, {MESSAGE_RULES[rule].section}"
    assert open_fds() == before
    # The stream behind it means nothing, and keeps nothing.
    assert decode(encode(Command.DEVICE_RESET, 1), [a_fd()], decoder=decoder) == []
    assert open_fds() == before
    decoder.end()


def test_the_header_is_judged_before_the_payload_is_awaited() -> None:
    with pytest.raises(MessageError, match="MessageTooLong"):
        decode(header(1, 10, 0x7FFF_FFFF))


@pytest.mark.parametrize("length", range(1, 48))
def test_a_connection_that_ends_in_a_message_is_named(length: int) -> None:
    before = open_fds()
    decoder = Decoder("server")
    decode(encode(Command.DMA_MAP, 1, DmaMap(32, 3, 0, 0, 4096))[:length], [a_fd()], decoder=decoder)
    with pytest.raises(MessageError, match=f"Truncated.* after {length} bytes"):
        decoder.end()
    assert open_fds() == before


@given(st.binary(max_size=200), st.sampled_from(["server", "client"]))
def test_arbitrary_bytes_raise_nothing_untyped(data: bytes, reader: Any) -> None:
    decoder = Decoder(reader)
    with suppress(MessageError):
        decode(data, decoder=decoder)
        decoder.end()


@given(
    st.sampled_from([*range(20), 999]),
    st.sampled_from([0, 1, 0x10, 0x21, 0x11, 2]),
    st.binary(max_size=80),
    st.integers(-2, 2),
)
def test_almost_right_messages_raise_nothing_untyped(command: int, flags: int, body: bytes, wrong: int) -> None:
    for reader in ("server", "client"):
        with suppress(MessageError):
            decode(header(7, command, max(0, 16 + len(body) + wrong), flags) + body, decoder=Decoder(reader))


# --- capabilities ---------------------------------------------------------------------------------------------


@given(
    st.builds(
        Capabilities,
        max_msg_fds=st.integers(0, 2**64 - 1),
        max_data_xfer_size=st.integers(1, 2**64 - 1),
        max_dma_maps=st.integers(1, 2**64 - 1),
        pgsizes=st.integers(1, 2**64 - 1),
        write_multiple=st.booleans(),
        named=st.just(frozenset({"max_msg_fds", "max_data_xfer_size", "max_dma_maps", "pgsizes", "write_multiple"})),
    )
)
def test_capabilities_come_back_as_they_were(capabilities: Capabilities) -> None:
    assert parse_capabilities(pack_capabilities(capabilities)) == capabilities


def test_what_is_not_said_has_its_documented_value() -> None:
    for data in (b"", b"{}\0", b'{"capabilities":{}}\0', b' {"other": 1} \0'):
        assert parse_capabilities(data) == Capabilities()
    found = parse_capabilities(b'{"capabilities":{"migration":{"pgsize":4096},"twin_socket":{"supported":true}}}\0')
    assert found == Capabilities(named=frozenset({"migration", "twin_socket"}))


@pytest.mark.parametrize(
    ("rule", "data"),
    [
        ("VersionData", b"{}"),
        ("VersionData", b"\0"),
        ("VersionData", b"{}\0{}\0"),
        ("VersionData", b"{\0"),
        ("VersionData", b"[]\0"),
        ("VersionData", b"\xff\xfe\0"),
        ("VersionData", b"[" * 16000 + b"\0"),
        ("VersionData", b"9" * 16000 + b"\0"),
        ("VersionData", b'{"capabilities":[]}\0'),
        ("VersionData", b'{"capabilities":null}\0'),
        ("Capability", b'{"capabilities":{"max_msg_fds":"16"}}\0'),
        ("Capability", b'{"capabilities":{"max_msg_fds":-1}}\0'),
        ("Capability", b'{"capabilities":{"max_msg_fds":true}}\0'),
        ("Capability", b'{"capabilities":{"max_data_xfer_size":0}}\0'),
        ("Capability", b'{"capabilities":{"max_data_xfer_size":1e3}}\0'),
        ("Capability", b'{"capabilities":{"max_dma_maps":NaN}}\0'),
        ("Capability", b'{"capabilities":{"pgsizes":18446744073709551616}}\0'),
        ("Capability", b'{"capabilities":{"write_multiple":1}}\0'),
    ],
)
def test_malformed_version_data_is_named(rule: str, data: bytes) -> None:
    with pytest.raises(MessageError) as found:
        parse_capabilities(data)
    assert found.value.rule == rule
    assert "\n" not in str(found.value)


@given(st.binary(max_size=100))
def test_arbitrary_version_data_raises_nothing_untyped(data: bytes) -> None:
    with suppress(MessageError):
        parse_capabilities(data + b"\0")


def test_region_accesses_read_as_the_document_has_them() -> None:
    (message,) = decode(header(3, 9, 32) + struct.pack("=QII", 0x14, 4, 1))
    assert message.payload == RegionAccess(0x14, 4, 1)
