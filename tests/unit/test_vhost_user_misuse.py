"""What a front-end, its guest or the user does to hold the server up: fds of the wrong end, races, lost signals."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from virtio_test._core import QueueConfig, RingLayout
from virtio_test.devices.base import BaseDevice
from virtio_test.devices.test import TestDevice
from virtio_test.errors import InvalidArgument, MessageError, PeerDisconnected
from virtio_test.features import FeatureSet
from virtio_test.loop import OwnerLoop
from virtio_test.sockets import endpoint as endpoint_module
from virtio_test.sockets.endpoint import Endpoint
from virtio_test.transport.vhost_user.backend import Backend
from virtio_test.transport.vhost_user.codec import OwnedFd
from virtio_test.transport.vhost_user.frontend import USER_OFFSET, FrontEnd
from virtio_test.transport.vhost_user.messages import Request
from virtio_test.transport.vhost_user.payloads import U64, VringAddress, VringState
from virtio_test.transport.vhost_user.rings import Kick

from .vhost_user_world import BUFFERS, MEMORY_BYTES, SIZE, Server, guest, serving
from .world import eventually, open_fds


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with serving(tmp_path / "s") as made:
        yield made


def served(server: Server) -> None:
    """The server serves as if nothing had happened."""
    with guest(server.path) as g:
        g.setup()
        g.front.enable(0)
        g.request(1)
    assert eventually(lambda: server.backend.session is None)


# --- fds of the wrong kind or the wrong end -------------------------------------------------------------------


def listening() -> list[socket.socket]:
    """Readable for ever: a connection waits, and `read` does not take it."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("")  # an abstract name of the kernel's choice
    listener.listen(1)
    caller = socket.socket(socket.AF_UNIX)
    caller.connect(listener.getsockname())
    return [listener, caller]


def connected() -> list[socket.socket]:
    return list(socket.socketpair())


def half_closed() -> list[socket.socket]:
    """Readable for ever: an end of file that is no hang-up."""
    one, other = socket.socketpair()
    other.shutdown(socket.SHUT_WR)
    return [one, other]


@pytest.mark.parametrize("make", [listening, half_closed, connected])
def test_a_kick_fd_is_no_socket(server: Server, make: Callable[[], list[socket.socket]]) -> None:
    sockets = make()
    with guest(server.path) as g:
        g.setup()
        g.front.enable(0)
        with pytest.raises(MessageError, match="Refused"):
            g.front.request(Request.SET_VRING_KICK, U64(0), [sockets[0].fileno()])
        g.request(1)
    for each in sockets:
        each.close()
    served(server)


@pytest.mark.parametrize(
    ("request_", "payload"),
    [
        (Request.SET_VRING_KICK, U64(0)),
        (Request.SET_VRING_CALL, U64(0)),
        (Request.SET_VRING_ERR, U64(0)),
        (Request.SET_BACKEND_REQ_FD, None),
    ],
)
def test_a_connection_does_not_hold_itself(server: Server, request_: Request, payload: U64 | None) -> None:
    """Kept by the server, the front-end's own end would leave it connected to itself, and nobody else served."""
    with FrontEnd(server.path) as front:
        front.negotiate()
        front.send(request_, payload, [front.socket.fileno()])
        with pytest.raises(PeerDisconnected):
            front.receive()
    assert eventually(lambda: server.backend.session is None)
    assert server.backend.last_error is not None
    assert server.backend.last_error.rule == "FdType"
    served(server)


def test_a_kick_that_somebody_else_takes_is_not_waited_for() -> None:
    """Blocking fds, announced by poll and empty when they are read: a read that waited would wait for ever."""
    event = os.eventfd(0, os.EFD_CLOEXEC)
    read, write = os.pipe()
    for given, filled in ((event, event), (read, write)):
        kick = Kick(OwnedFd(os.dup(given)), 0)
        assert os.get_blocking(given)
        assert not kick.drain()
        os.write(filled, struct.pack("=Q", 3))
        assert select.select([kick.fileno()], [], [], 0)[0]
        assert kick.drain()
        assert not kick.drain()
        os.write(filled, struct.pack("=Q", 3))
        assert select.select([kick.fileno()], [], [], 0)[0]
        os.read(given, 8)
        assert not kick.drain()
    for fd in (event, read, write):
        os.close(fd)


def test_a_kick_fd_is_no_semaphore(server: Server) -> None:
    """One write to it, and it would be readable for hours."""
    kick = os.eventfd(1 << 31, os.EFD_SEMAPHORE)
    says = Path(f"/proc/self/fdinfo/{kick}").read_text("ascii")
    with guest(server.path) as g:
        g.setup()
        g.front.enable(0)
        if "eventfd-semaphore" in says:
            with pytest.raises(MessageError, match="Refused"):
                g.front.request(Request.SET_VRING_KICK, U64(0), [kick])
        else:  # Linux before 6.5 does not say which kind it is.
            g.front.request(Request.SET_VRING_KICK, U64(0), [kick])
        g.request(1)
    os.close(kick)
    served(server)


def test_the_name_of_a_wrong_file_stays_one_line(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a\nvirtio-test: all is well"
    path.write_bytes(b"")
    with path.open() as file, guest(server.path) as g, pytest.raises(MessageError, match="Refused"):
        g.front.request(Request.SET_VRING_KICK, U64(0), [file.fileno()])
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "all is well" in warning
    assert "\n" not in warning


# --- rings ----------------------------------------------------------------------------------------------------


def test_a_ring_that_cannot_be_stops_itself_and_not_the_server(tmp_path: Path) -> None:
    """A size that a packed ring may have and a split one may not, and the features that change in between."""
    device = BaseDevice(45, handlers={0: lambda _: b"x" * 12, 1: lambda _: b""})
    with serving(tmp_path / "s", device) as server, guest(server.path, packed=True) as g:
        at = USER_OFFSET + 0x8000
        g.front.request(Request.SET_VRING_NUM, VringState(1, 100))
        g.front.request(Request.SET_VRING_ADDR, VringAddress(1, 0, at, at + 0x2000, at + 0x1000))
        g.front.set_features(g.front.features - FeatureSet("RING_PACKED"))
        layout = RingLayout.contiguous(SIZE, 0x1000, packed=False)
        g.config = QueueConfig.from_layout(layout, features=g.front.features.bits)
        g.setup()
        g.front.enable(0)
        error, kick = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0)
        g.front.request(Request.SET_VRING_ERR, U64(1), [error])
        g.front.request(Request.SET_VRING_KICK, U64(1), [kick])
        g.front.enable(1)
        assert os.eventfd_read(error) == 1
        assert g.front.get_status() == 0x40
        queue = g.queue
        assert queue is not None
        queue.add([(BUFFERS, 48)], [(BUFFERS + 64, 12)])
        queue.publish()
        g.kick()
        assert eventually(lambda: bool(queue.get_used_many()))
        assert g.front.number(Request.GET_FEATURES)
        os.close(error)
        os.close(kick)


def test_a_call_and_an_error_wait_for_the_fd_that_tells_of_them(server: Server) -> None:
    with guest(server.path) as g:
        g.setup()
        assert g.queue is not None
        assert g.ring is not None
        g.front.request(Request.SET_VRING_CALL, U64(0x100))
        g.front.request(Request.SET_VRING_ERR, U64(0x100))
        g.front.enable(0)
        g.post(1)
        g.kick()
        assert g.used() == [1]
        g.front.request(Request.SET_VRING_CALL, U64(0), [g.ring.call.fileno()])
        assert g.ring.call.drain() == 1
        g.memory.write(g.queue.layout().at("avail.idx"), struct.pack("<H", 60_000))
        g.kick()
        assert eventually(lambda: g.front.get_status() == 0x40)
        g.front.request(Request.SET_VRING_ERR, U64(0), [g.ring.error.fileno()])
        assert g.ring.error.drain() == 1
        g.front.request(Request.SET_VRING_ERR, U64(0), [g.ring.error.fileno()])
        assert g.ring.error.drain() == 0


@pytest.mark.parametrize("request_", [Request.RESET_DEVICE, Request.RESET_OWNER])
def test_a_front_end_that_cannot_enable_rings_keeps_them_enabled(server: Server, request_: Request) -> None:
    with guest(server.path, protocol_bit=False) as g:
        g.setup()
        g.request(1)
        g.front.request(request_)
        g.setup()
        g.request(2)


def test_a_queue_full_of_counters_is_answered_at_once(tmp_path: Path) -> None:
    lines: list[str] = []
    device = TestDevice(timer=True, first_after=1000.0, console=lines.append)
    with serving(tmp_path / "s", device) as server, guest(server.path) as g:
        g.setup()
        g.front.enable(0)
        queue = g.queue
        assert queue is not None
        for _ in range(10):
            queue.add([(0, MEMORY_BYTES)] * 8, [])
        queue.publish()
        start = time.monotonic()
        g.kick()
        assert eventually(lambda: device.counters.counters == 10 * 8 * MEMORY_BYTES // 4)
        assert time.monotonic() - start < 5.0
        # Counted first, then shown, in the server's thread.
        assert eventually(lambda: len(lines) == 10 * 1024)
        assert device.counters.unshown == device.counters.counters - len(lines)


# --- the machine ----------------------------------------------------------------------------------------------


def test_a_front_end_that_cannot_be_accepted_is_not_asked_for_all_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loop = OwnerLoop()
    with Backend(TestDevice(console=lambda _: None), path=tmp_path / "s", loop=loop) as backend:
        tries = 0

        class Refusing:
            def __init__(self, listener: socket.socket) -> None:
                self._listener = listener

            def fileno(self) -> int:
                return self._listener.fileno()

            def close(self) -> None:
                self._listener.close()

            def accept(self) -> tuple[socket.socket, object]:
                nonlocal tries
                tries += 1
                if tries < 4:
                    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
                return self._listener.accept()

        listener = backend._endpoint.listener  # pyright: ignore[reportPrivateUsage]
        assert listener is not None
        monkeypatch.setattr(backend._endpoint, "listener", Refusing(listener))  # pyright: ignore[reportPrivateUsage]
        with FrontEnd(tmp_path / "s"):
            assert loop.run(until=lambda: backend.session is not None, timeout=10.0)
        assert tries == 4
        assert sum("cannot be accepted" in record.getMessage() for record in caplog.records) == 1


def test_a_locked_folder_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint_module, "_LOCK_SECONDS", 0.05)
    stale = tmp_path / "stale"
    dead = Endpoint(stale)
    assert dead.listener is not None
    dead.listener.close()
    before = open_fds()
    fd = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    endpoint = Endpoint(tmp_path / "s")
    endpoint.close()
    # Whose socket it is cannot be told without the lock: it is left alone.
    with pytest.raises(InvalidArgument, match="stale"):
        Endpoint(stale)
    assert stale.is_socket()
    os.close(fd)
    assert open_fds() == before
    Endpoint(stale).close()
    assert not stale.exists()


STOPPED_AT_BIRTH = """
import os, signal, sys
from virtio_test.devices.test import TestDevice
from virtio_test.transport.vhost_user.backend import serve

class Signalled(TestDevice):
    def attach(self, bus):
        super().attach(bus)
        os.kill(os.getpid(), int(sys.argv[2]))

serve(Signalled(), sys.argv[1])
print("ended")
"""


@pytest.mark.parametrize("number", [2, 15])
def test_a_signal_before_the_loop_runs_leaves_no_socket(tmp_path: Path, number: int) -> None:
    path = tmp_path / "s"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STOPPED_AT_BIRTH, str(path), str(number)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n", "")
    assert not path.exists()
