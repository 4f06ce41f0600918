"""Where messages, paths and peers of a socket begin and end: each number, and the next one."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
from virtio_test.errors import InvalidArgument, MessageError
from virtio_test.loop import OwnerLoop
from virtio_test.sockets import endpoint as endpoint_module
from virtio_test.sockets.endpoint import Endpoint
from virtio_test.sockets.fds import OwnedFd
from virtio_test.sockets.frames import FrameDecoder
from virtio_test.sockets.server import PeerServer

from .world import a_fd

# --- messages -------------------------------------------------------------------------------------------------


class Lengths(FrameDecoder[int, tuple[bytes, int]]):
    """A header of two bytes, the second of which says how many follow; two fds at most."""

    def __init__(self) -> None:
        super().__init__(header_bytes=2, max_fds=2, violation=lambda rule, text: MessageError(rule, "none", text))

    def _parse_header(self, data: bytes) -> tuple[int, int]:
        return data[0], data[1]

    def _parse(self, header: int, body: bytes, fds: tuple[OwnedFd, ...]) -> tuple[bytes, int]:
        return bytes([header]) + body, len(fds)


def fed(decoder: Lengths, data: bytes, fds: int = 0, *, cut: bool = False) -> list[tuple[bytes, int]]:
    return list(islice(decoder.feed(data, [a_fd() for _ in range(fds)], cut=cut), 10))


def test_a_message_is_there_with_its_last_byte() -> None:
    decoder = Lengths()
    found: list[Sequence[object]] = []
    for number, byte in enumerate(b"a\2xyb\0c\1z"):
        found.append((number, fed(decoder, bytes([byte])), decoder.wanted, decoder.pending))
    assert found == [
        (0, [], 1, True),
        (1, [], 2, True),
        (2, [], 1, True),
        (3, [(b"axy", 0)], 2, False),
        (4, [], 1, True),
        (5, [(b"b", 0)], 2, False),
        (6, [], 1, True),
        (7, [], 1, True),
        (8, [(b"cz", 0)], 2, False),
    ]
    assert fed(decoder, b"a\2xyb\0c\1z") == [(b"axy", 0), (b"b", 0), (b"cz", 0)]
    decoder.end()


@pytest.mark.parametrize(("data", "fds", "have"), [(b"a", 0, 1), (b"a\2", 0, 2), (b"a\2x", 0, 3), (b"", 1, 0)])
def test_a_connection_that_ends_in_a_message(data: bytes, fds: int, have: int) -> None:
    decoder = Lengths()
    assert fed(decoder, data, fds) == []
    assert decoder.pending
    with pytest.raises(MessageError, match=f"Truncated.* after {have} bytes"):
        decoder.end()
    assert not decoder.pending
    decoder.end()
    assert fed(decoder, b"b\0", 1) == []
    decoder.end()


@pytest.mark.parametrize(("count", "cut", "fits"), [(2, False, True), (3, False, False), (0, True, False)])
def test_as_many_fds_as_one_message_has(count: int, *, cut: bool, fits: bool) -> None:
    decoder = Lengths()
    if fits:
        assert fed(decoder, b"a\0", count, cut=cut) == [(b"a", count)]
    else:
        with pytest.raises(MessageError, match="FdCount"):
            fed(decoder, b"a\0", count, cut=cut)
        assert not decoder.pending


# --- paths ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_a_file_is_no_stale_socket_whatever_its_mode(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "s"
    path.write_text("mine")
    path.chmod(mode)
    with pytest.raises(InvalidArgument, match="a file is there"):
        Endpoint(path)
    assert path.read_text() == "mine"


def test_another_socket_that_took_our_place_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    endpoint = Endpoint(path)
    path.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
        other.bind(str(path))
        endpoint.close()
        assert path.exists()


@pytest.mark.parametrize(("mode", "uid"), [(stat.S_IFREG, 0), (stat.S_IFSOCK, 1)])
def test_what_was_exchanged_between_binding_and_looking_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int, uid: int
) -> None:
    looked = os.stat_result((mode | 0o600, 5, 5, 1, os.geteuid() + uid, 0, 0, 0, 0, 0))

    def lstat(_: Path) -> os.stat_result:
        return looked

    monkeypatch.setattr(Path, "lstat", lstat)
    with pytest.raises(InvalidArgument, match=r"a file is there|another program is there"):
        Endpoint(tmp_path / "s")


def test_a_folder_that_somebody_keeps_locked_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(10))
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        assert len(slept) < 10

    clock = SimpleNamespace(monotonic=lambda: float(next(now)), sleep=sleep)
    monkeypatch.setattr(endpoint_module, "time", clock)
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    # Two seconds from 0 on: at 1 and at 2 it is tried again, at 3 no more.
    Endpoint(tmp_path / "s").close()
    os.close(folder)
    assert slept == [0.01, 0.01]


# --- peers ----------------------------------------------------------------------------------------------------


class Counting(PeerServer):
    """A server that knows how many peers it has."""

    def __init__(self, path: Path | None, *, fd: int | None = None) -> None:
        super().__init__(path, fd=fd, loop=OwnerLoop(), peer="peer", log=logging.getLogger("none"))
        self.peers: list[socket.socket] = []
        self._start()

    def _begin(self, connection: socket.socket) -> None:
        self.peers.append(connection)

    def _readable(self) -> None:
        self._disconnect()

    def _end(self) -> None:
        self.peers.pop().close()

    def accept(self) -> None:
        self._accept()


Server = Callable[..., Counting]


@pytest.fixture
def serving() -> Iterator[Server]:
    made: list[Counting] = []

    def serve(path: Path | None, **options: int) -> Counting:
        made.append(Counting(path, **options))
        return made[-1]

    yield serve
    for each in made:
        each.close()


def a_peer(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.connect(str(path))
    return made


def test_one_peer_at_a_time(tmp_path: Path, serving: Server) -> None:
    path = tmp_path / "s"
    server = serving(path)
    assert not server.finished
    with a_peer(path), a_peer(path):
        server.accept()
        assert (len(server.peers), server.sessions) == (1, 1)
        server.accept()
        assert (len(server.peers), server.sessions) == (1, 1)
        assert not server.finished
    for _ in range(4):
        server.loop.run_pending()
    assert (len(server.peers), server.sessions) == (0, 2)
    server.close()
    assert server.finished
    server.accept()
    server.close()
    assert server.finished


def test_the_one_connection_that_was_given(serving: Server) -> None:
    ours, theirs = socket.socketpair()
    server = serving(None, fd=theirs.detach())
    assert (len(server.peers), server.finished) == (1, False)
    ours.close()
    server.loop.run_pending()
    assert (len(server.peers), server.finished) == (0, True)
