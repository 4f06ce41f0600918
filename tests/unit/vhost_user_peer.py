"""A back-end that answers every message as a good one would, until it is told to do worse. It has no rings."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from virtio_test.transport.vhost_user.codec import Decoder, Message, encode_reply
from virtio_test.transport.vhost_user.messages import FRONTEND_REQUESTS, ProtocolFeature, Request
from virtio_test.transport.vhost_user.payloads import U64, Config, Inflight, Payload, VringState
from virtio_test.transport.vhost_user.wire import Wire

F = ProtocolFeature
PROTOCOL = (
    F.MQ | F.REPLY_ACK | F.BACKEND_REQ | F.CONFIG | F.INFLIGHT_SHMFD | F.RESET_DEVICE | F.CONFIGURE_MEM_SLOTS | F.STATUS
)
FEATURES = 1 << 32 | 1 << 30 | 1 << 28 | 1
PATIENCE = 10.0

Fault = Callable[["Peer", Message, bytes], None]
"""What the peer does about one message; the bytes are its good reply, or those of an acknowledgement."""


class Peer:
    """A back-end at `path`, one front-end after the other.

    Args:
        path: where it listens.
        faults: what to do about a request instead of answering it.
        protocol: protocol features on offer.
        features: feature bits on offer.
        answers: payloads of replies that differ from the good ones.
        config: its configuration space.
    """

    def __init__(
        self,
        path: Path,
        *,
        faults: Mapping[Request, Fault] | None = None,
        protocol: ProtocolFeature = PROTOCOL,
        features: int = FEATURES,
        answers: Mapping[Request, Payload | None] | None = None,
        config: bytes = bytes(256),
    ) -> None:
        self.path = path
        self.faults = dict(faults or {})
        self.protocol = protocol
        self.features = features
        self.answers = dict(answers or {})
        self.config = config
        self.seen: list[Message] = []
        self.chosen = ProtocolFeature(0)
        self.status = 0
        self.stop = threading.Event()
        self.connection: socket.socket | None = None
        self.channel: socket.socket | None = None
        self.fds: dict[tuple[Request, int], int] = {}
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(4)
        self._listener.settimeout(0.02)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self.stop.set()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        self._listener.close()
        self._forget()

    def names(self) -> list[str]:
        """What was asked so far."""
        return [getattr(message.request, "name", str(message.request)) for message in self.seen]

    def hang_up(self) -> None:
        """Leave the front-end, from any thread."""
        assert self.connection is not None
        self.connection.shutdown(socket.SHUT_RDWR)

    def _forget(self) -> None:
        for fd in self.fds.values():
            os.close(fd)
        self.fds.clear()
        if self.channel is not None:
            self.channel.close()
            self.channel = None

    def _run(self) -> None:
        while not self.stop.is_set():
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            with connection:
                self.connection = connection
                self._serve(connection)
            self._forget()

    def _serve(self, connection: socket.socket) -> None:
        self.chosen, self.status = ProtocolFeature(0), 0
        wire = Wire(connection, Decoder(FRONTEND_REQUESTS), timeout=PATIENCE)
        try:
            while not self.stop.is_set():
                if not wire.waiting:
                    self.stop.wait(0.001)
                    continue
                message = wire.receive()
                self.seen.append(message)
                good, fds = self._answer(message)
                fault = self.faults.get(Request(message.request))
                try:
                    if fault is not None:
                        fault(self, message, good or encode_reply(message.request, U64(0)))
                    elif good:
                        socket.send_fds(connection, [good], fds)
                finally:
                    for fd in fds:
                        os.close(fd)
        except Exception:  # noqa: BLE001 - the front-end has left, or a fault has made it leave
            return

    def _answer(self, message: Message) -> tuple[bytes, list[int]]:
        """The good reply and its fds; nothing where none is due."""
        request, payload, fds = Request(message.request), message.payload, list[int]()
        reply: Payload | None = None
        match request:
            case Request.GET_FEATURES:
                reply = U64(self.features)
            case Request.GET_PROTOCOL_FEATURES:
                reply = U64(int(self.protocol))
            case Request.SET_PROTOCOL_FEATURES:
                assert isinstance(payload, U64)
                self.chosen = ProtocolFeature(payload.value)
            case Request.GET_QUEUE_NUM:
                reply = U64(1)
            case Request.GET_MAX_MEM_SLOTS:
                reply = U64(8)
            case Request.SET_STATUS:
                assert isinstance(payload, U64)
                self.status = payload.value
            case Request.GET_STATUS:
                reply = U64(self.status)
            case Request.GET_CONFIG:
                assert isinstance(payload, Config)
                data = self.config[payload.offset : payload.offset + payload.size]
                reply = Config(payload.offset, len(data), payload.flags, data)
            case Request.GET_VRING_BASE:
                assert isinstance(payload, VringState)
                reply = VringState(payload.index, 0)
            case Request.GET_INFLIGHT_FD:
                assert isinstance(payload, Inflight)
                size = payload.queues * 64 * payload.queue_size
                fds.append(memfd(size))
                reply = Inflight(size, 0, payload.queues, payload.queue_size)
            case Request.SET_BACKEND_REQ_FD:
                self.channel = socket.socket(fileno=message.fds[0].take())
            case Request.SET_VRING_KICK | Request.SET_VRING_CALL | Request.SET_VRING_ERR:
                assert isinstance(payload, U64)
                key = request, payload.value & 0xFF
                if key in self.fds:
                    os.close(self.fds[key])
                self.fds[key] = message.fds[0].take()
            case _:
                pass
        if request in self.answers:
            reply = self.answers[request]
        if reply is not None or FRONTEND_REQUESTS[int(request)].reply is not None:
            return encode_reply(request, reply), fds
        if message.need_reply:
            return encode_reply(request, U64(0)), fds
        return b"", fds


@contextmanager
def peer(path: Path, **options: object) -> Generator[Peer]:
    """A peer at `path`, gone at the end."""
    made = Peer(path, **options)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        made.close()


def memfd(size: int) -> int:
    fd = os.memfd_create("peer")
    os.truncate(fd, size)
    return fd


# --- what it can do about a message -----------------------------------------------------------------------------


def _send(peer: Peer, data: bytes, fds: tuple[int, ...] = ()) -> None:
    assert peer.connection is not None
    socket.send_fds(peer.connection, [data], list(fds))


def _header(good: bytes, *, request: int = 0, flags: int = 0, size: int = 0) -> bytes:
    """The good reply with these added to the fields of its header."""
    now = struct.unpack_from("=III", good)
    return struct.pack("=III", now[0] + request, now[1] ^ flags, now[2] + size) + good[12:]


def close(peer: Peer, _: Message, __: bytes) -> None:
    peer.hang_up()


def hang(peer: Peer, _: Message, __: bytes) -> None:
    peer.stop.wait(PATIENCE)


def hang_inside(peer: Peer, _: Message, good: bytes) -> None:
    _send(peer, good[:7])
    peer.stop.wait(PATIENCE)


def dribble(peer: Peer, _: Message, good: bytes) -> None:
    """A byte now and then, for longer than anybody waits."""
    while not peer.stop.wait(0.05):
        _send(peer, good[:1])


def cut(peer: Peer, _: Message, good: bytes) -> None:
    _send(peer, good[:-1])
    peer.hang_up()


def other_request(peer: Peer, _: Message, good: bytes) -> None:
    """A well-formed reply to a request that nobody sent."""
    assert struct.unpack_from("=I", good)[0] != Request.CHECK_DEVICE_STATE
    _send(peer, encode_reply(Request.CHECK_DEVICE_STATE, U64(0)))


def unknown_request(peer: Peer, _: Message, good: bytes) -> None:
    _send(peer, _header(good, request=1000))


def no_reply_flag(peer: Peer, _: Message, good: bytes) -> None:
    _send(peer, _header(good, flags=0x4))


def other_version(peer: Peer, _: Message, good: bytes) -> None:
    _send(peer, _header(good, flags=0x3))


def reserved_flag(peer: Peer, _: Message, good: bytes) -> None:
    _send(peer, _header(good, flags=0x100))


def too_long(peer: Peer, _: Message, good: bytes) -> None:
    _send(peer, _header(good, size=0x10000))


def too_short(peer: Peer, _: Message, good: bytes) -> None:
    _send(peer, _header(good, size=-5)[:-5])


def with_fds(peer: Peer, _: Message, good: bytes) -> None:
    own = [os.dup(0) for _ in range(3)]
    _send(peer, good, tuple(own))
    for fd in own:
        os.close(fd)


def refuse(peer: Peer, message: Message, _: bytes) -> None:
    _send(peer, encode_reply(message.request, U64(5)))


def empty(peer: Peer, message: Message, _: bytes) -> None:
    _send(peer, encode_reply(message.request))
