"""The Python codecs against any bytes: what must hold. `fuzz/python.py` runs it with libFuzzer.

| target | what any bytes become | what must hold |
|---|---|---|
| vhost_user | messages of either side, requests or replies | `MessageError`, or one that encodes to the same bytes |
| vfio_user | commands and replies, read by either side | the same |
| inflight | a region of either format, that another back-end left | `MessageError`, or each head once, in the queue |
| case | a frozen case | `InvalidArgument`, or a case that encodes to itself |
| uml | commands of user-mode Linux, in any pieces | each is carried out, noted, or without room; never an exception |
| saved | the state of a function with a device, changed | `SavedStateError` and nothing changed; a reset heals |

A target is a function from bytes that raises when something is wrong. Tests call them too, with a few bytes.
"""

from __future__ import annotations

import os
import tempfile
from functools import cache
from typing import TYPE_CHECKING, Any, Final

from hypothesis import given
from hypothesis import strategies as st
from virtio_test.carrier.vfio_user import codec as vfio
from virtio_test.carrier.vfio_user.messages import COMMANDS
from virtio_test.devices.rng import RngDevice
from virtio_test.errors import InvalidArgument, MessageError
from virtio_test.sockets.fds import OwnedFd
from virtio_test.strategies import RingCase
from virtio_test.transport.vhost_user import codec as vhost
from virtio_test.transport.vhost_user.inflight import InflightQueue, InflightRegion
from virtio_test.transport.vhost_user.messages import BACKEND_REQUESTS, FRONTEND_REQUESTS

from tests.property import test_saved_state
from tests.unit.uml_world import UmlKernel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from virtio_test.sockets.frames import FrameDecoder

QUEUE_SIZE: Final = 4
ROOM: Final = 4096


def _messages(decoder: FrameDecoder[Any, Any], data: bytes, *, fds: int, cut: int) -> Iterator[Any]:
    """All messages of a stream that comes in two pieces, the fds with the first."""
    own = [os.dup(2) for _ in range(fds)]
    try:
        yield from decoder.feed(data[:cut], own)
        yield from decoder.feed(data[cut:])
    finally:
        decoder.close()


def vhost_user(data: bytes) -> None:
    """Byte 0: whose requests, replies, fds; byte 1: where the stream is cut."""
    if len(data) < 2:
        return
    table = FRONTEND_REQUESTS if data[0] & 1 else BACKEND_REQUESTS
    replies, stream, at = bool(data[0] & 2), data[2:], 0
    decoder = vhost.Decoder(table, replies=replies)
    try:
        for message in _messages(decoder, stream, fds=data[0] >> 6, cut=data[1]):
            flags, size = (int.from_bytes(stream[at + place : at + place + 4], "little") for place in (4, 8))
            payload = message.payload
            body = payload.data if isinstance(payload, vhost.Unknown) else payload.pack()
            # Padding may be missing, and is anything.
            fields = len(body) - payload.SLACK
            assert fields <= size <= len(body)
            words = (message.request, flags, size)
            whole = b"".join(word.to_bytes(4, "little") for word in words) + body[:fields]
            assert stream[at : at + len(whole)] == whole
            assert message.reply == replies
            assert message.need_reply == bool(flags & 8)
            at += 12 + size
            message.close()
    except MessageError as error:
        assert error.rule
        assert "\n" not in str(error)


def vfio_user(data: bytes) -> None:
    """Byte 0: who reads, fds; byte 1: where the stream is cut."""
    if len(data) < 2:
        return
    stream, at = data[2:], 0
    decoder = vfio.Decoder("server" if data[0] & 1 else "client")
    try:
        for message in _messages(decoder, stream, fds=data[0] >> 6, cut=data[1]):
            payload = message.payload
            if message.errno is not None:
                whole = vfio.encode_error(message.command, message.id, message.errno)
            elif isinstance(payload, vfio.Unknown):
                assert message.command not in COMMANDS
                whole = vfio.encode(message.command, message.id, no_reply=message.no_reply) + payload.data
                whole = whole[:4] + len(whole).to_bytes(4, "little") + whole[8:]
            elif message.reply:
                whole = vfio.encode_reply(message.command, message.id, payload)
            else:
                whole = vfio.encode(message.command, message.id, payload, no_reply=message.no_reply)
            # Structures that grow may be longer than we know them.
            said = int.from_bytes(stream[at + 4 : at + 8], "little")
            slack = said - len(whole)
            assert 0 <= slack <= getattr(payload, "SLACK", 0)
            whole = whole[:4] + said.to_bytes(4, "little") + whole[8:]
            # The errno of what is no error means nothing.
            skip = 16 if message.errno is not None else 12
            assert stream[at : at + skip] == whole[:skip]
            assert stream[at + 16 : at + len(whole)] == whole[16:]
            at += said
            message.close()
    except MessageError as error:
        assert error.rule
        assert "\n" not in str(error)


@cache
def _file() -> OwnedFd:
    with tempfile.TemporaryFile() as file:
        return OwnedFd(os.dup(file.fileno()))


def inflight(data: bytes) -> None:
    """Byte 0: format; bytes 1 to 8: used index, or the flags of four descriptors; then two queues."""
    if len(data) < 9:
        return
    packed, size = bool(data[0] & 1), 512
    words = [int.from_bytes(data[at : at + 2], "little") for at in (1, 3, 5, 7)]
    own = _file()
    os.pwrite(own.fileno(), data[9 : 9 + size].ljust(size, b"\0"), 0)
    try:
        region = InflightRegion(own, size, 0, queues=2, queue_size=QUEUE_SIZE, packed=packed)
        for index in range(2):
            found = region.packed_queue(index, words.__getitem__) if packed else region.split(index, words[0])
            _judge(found)
    except MessageError as error:
        assert error.rule


def _judge(found: InflightQueue) -> None:
    assert len(set(found.heads)) == len(found.heads) <= QUEUE_SIZE
    assert all(0 <= head < QUEUE_SIZE for head in found.heads)
    assert len(found.heads) <= found.descriptors <= QUEUE_SIZE
    assert 0 <= found.used <= 0xFFFF


def case(data: bytes) -> None:
    """JSON, if it is that."""
    try:
        found = RingCase.from_json(data)
    except InvalidArgument as error:
        assert "\n" not in str(error)
        return
    again = RingCase.from_json(found.to_json())
    assert again == found
    assert again.to_json() == found.to_json()


@cache
def _kernel() -> UmlKernel:
    return UmlKernel(RngDevice(), buffers=0)


def uml(data: bytes) -> None:
    """Byte 0: room for the answer; byte 1: where the command is cut in two descriptors."""
    if len(data) < 3:
        return
    kernel = _kernel()
    command, cut = data[2 : 2 + ROOM], data[1]
    before = sum(kernel.uml.commands.values()) + sum(kernel.uml.ignored.values())
    answer = kernel.send([piece for piece in (command[:cut], command[cut:]) if piece], [data[0]] if data[0] else [])
    after = sum(kernel.uml.commands.values()) + sum(kernel.uml.ignored.values())
    # A read without room was carried out, and noted as well.
    assert after - before in (1, 2)
    assert len(answer) <= data[0]
    kernel.uml.errors.clear()


@given(data=st.data())
def _saved(data: st.DataObject) -> None:
    inner: Any = test_saved_state.test_any_state_is_taken_or_refused_whole_and_a_reset_heals
    inner.hypothesis.inner_test(way="pci", ring="packed", data=data)


def saved(data: bytes) -> None:
    """What Hypothesis draws from these bytes."""
    given_test: Any = _saved
    given_test.hypothesis.fuzz_one_input(data)


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    "vhost_user": vhost_user,
    "vfio_user": vfio_user,
    "inflight": inflight,
    "case": case,
    "uml": uml,
    "saved": saved,
}
