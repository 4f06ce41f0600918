"""The servers' sockets: one peer at a time, for this user alone, and nobody's file is touched, whoever is in the way.

Each is held against all three servers, as a library serves them: a vhost-user back-end, a vfio-user server, and the
back-end that carries a PCI function for user-mode Linux.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Final

import pytest
from virtio_test._core import GuestMemory
from virtio_test.carrier.uml import UmlPci
from virtio_test.carrier.vfio_user.client import VfioUserClient
from virtio_test.carrier.vfio_user.server import VfioUserServer
from virtio_test.errors import InvalidArgument, PeerDisconnected
from virtio_test.loop import OwnerLoop
from virtio_test.sockets import endpoint
from virtio_test.sockets.endpoint import MAX_PATH_BYTES, Endpoint
from virtio_test.sockets.server import PeerServer
from virtio_test.transport.pci.function import VirtioPci
from virtio_test.transport.vhost_user.backend import Backend
from virtio_test.transport.vhost_user.codec import encode
from virtio_test.transport.vhost_user.frontend import FrontEnd
from virtio_test.transport.vhost_user.messages import Request
from virtio_test.transport.vhost_user.payloads import U64, VringState

from tests.cli.conftest import COMMAND
from tests.hostile.world import upper
from tests.unit.world import PATIENCE, ServerThread, eventually, open_fds

KINDS: Final = ("vhost-user", "vfio-user", "uml")
SERVERS = pytest.mark.parametrize("kind", KINDS)


def make(kind: str, path: Path) -> PeerServer:
    if kind == "vhost-user":
        return Backend(upper(), path=path)
    loop, memory = OwnerLoop(), GuestMemory()
    function = VirtioPci(upper(), loop=loop, memory=memory)
    if kind == "vfio-user":
        return VfioUserServer(function, path=path)
    return Backend(UmlPci(function), path=path, loop=loop, memory=memory)


@contextmanager
def serving(kind: str, path: Path) -> Generator[PeerServer]:
    server = make(kind, path)
    with closing(ServerThread(path, server)):
        yield server


def ask(kind: str, path: Path) -> bool:
    """Whether a peer is served."""
    if kind == "vfio-user":
        with VfioUserClient(path, memory=GuestMemory([(0, 4096)]), timeout=PATIENCE) as client:
            return client.read_config(0, 2) == 0x1AF4
    with FrontEnd(path, timeout=PATIENCE) as front:
        return bool(front.number(Request.GET_FEATURES))


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """What is in a folder, with its inode, mode and content."""
    return {
        each.name: (
            each.lstat().st_ino,
            each.lstat().st_mode,
            each.read_bytes() if each.is_file() and not each.is_symlink() else b"",
        )
        for each in folder.iterdir()
    }


def bound(path: Path, *, listening: bool = False, mode: int = 0o600, kind: int = socket.SOCK_STREAM) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, kind)
    made.bind(str(path))
    path.chmod(mode)
    if listening:
        made.listen(1)
    return made


# --- who may connect -----------------------------------------------------------------------------------------------


@SERVERS
@pytest.mark.parametrize("umask", [0, 0o022, 0o077])
def test_a_socket_is_for_this_user_alone(tmp_path: Path, kind: str, umask: int) -> None:
    """Whatever the umask, and in a folder that everybody may write into."""
    tmp_path.chmod(0o777)
    before = os.umask(umask)
    try:
        with closing(make(kind, tmp_path / "s")):
            assert stat.S_IMODE((tmp_path / "s").lstat().st_mode) == 0o600
    finally:
        os.umask(before)
    assert snapshot(tmp_path) == {}


@SERVERS
def test_its_mode_is_never_another(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first moment that its file is there: nobody can connect between binding and a change of the mode."""
    modes: list[int] = []
    listen = socket.socket.listen

    def looked(self: socket.socket, backlog: int = 1) -> None:
        modes.append(stat.S_IMODE((tmp_path / "s").lstat().st_mode))
        listen(self, backlog)

    monkeypatch.setattr(socket.socket, "listen", looked)
    before = os.umask(0)
    try:
        make(kind, tmp_path / "s").close()
    finally:
        os.umask(before)
    assert modes == [0o600]


@SERVERS
def test_one_peer_at_a_time(tmp_path: Path, kind: str) -> None:
    """The second waits, unheard, and is served when the first has gone; what it had sent is not lost."""
    path = tmp_path / "s"
    with serving(kind, path) as server:
        with socket.socket(socket.AF_UNIX) as first:
            first.connect(str(path))
            assert eventually(lambda: server.sessions == 1)
            answers: list[bool] = []
            second = threading.Thread(target=lambda: answers.append(ask(kind, path)))
            second.start()
            time.sleep(0.05)
            assert answers == []
            assert server.sessions == 1
        second.join(PATIENCE)
        assert answers == [True]
        assert server.sessions == 2


@SERVERS
def test_a_crowd_at_the_door_is_served_in_the_end(tmp_path: Path, kind: str) -> None:
    """Many connect at once and say nothing, or half a header; then they go, and a good one comes."""
    path = tmp_path / "s"
    before = open_fds()
    with serving(kind, path):
        ask(kind, path)
        crowd(path)
        assert ask(kind, path)
    assert eventually(lambda: open_fds() == before)


def crowd(path: Path) -> None:
    with ExitStack() as stack:
        for number in range(20):
            each = stack.enter_context(socket.socket(socket.AF_UNIX))
            # The backlog may be full: to wait there is its own affair.
            each.settimeout(0.0)
            with suppress(BlockingIOError):
                each.connect(str(path))
                if number % 2:
                    each.send(b"\x01\0\0\0\x01")


@SERVERS
def test_nothing_of_one_peer_is_seen_by_the_next(tmp_path: Path, kind: str) -> None:
    if kind == "vfio-user":
        with serving(kind, tmp_path / "s"):
            with VfioUserClient(tmp_path / "s", memory=GuestMemory([(0, 4096)])) as client:
                client.write_config(4, 2, 7)
                client.write_config(0x3C, 1, 0x42)
            with VfioUserClient(tmp_path / "s", memory=GuestMemory([(0, 4096)])) as client:
                assert client.read_config(4, 2) == 0
                assert client.read_config(0x3C, 1) == 0
        return
    with serving(kind, tmp_path / "s") as server:
        with FrontEnd(tmp_path / "s", timeout=PATIENCE) as front:
            front.negotiate()
            front.request(Request.SET_VRING_NUM, VringState(0, 64))
            front.set_status(3)
        assert eventually(lambda: isinstance(server, Backend) and server.session is None)
        with FrontEnd(tmp_path / "s", timeout=PATIENCE) as front:
            assert isinstance(server, Backend)
            # Nothing was negotiated here: what needs it is refused.
            front.send_bytes(encode(Request.GET_CONFIG, None)[:8] + bytes(4))
            with pytest.raises(PeerDisconnected):
                front.receive()


# --- what is in the way --------------------------------------------------------------------------------------------


def a_file(path: Path) -> None:
    path.write_text("mine")


def an_empty_file_of_its_mode(path: Path) -> None:
    path.touch()
    path.chmod(0o600)


def a_folder(path: Path) -> None:
    path.mkdir()


def a_fifo(path: Path) -> None:
    os.mkfifo(path, 0o600)


def a_link_to_a_file(path: Path) -> None:
    (path.parent / "target").write_text("mine")
    path.symlink_to("target")


def a_dangling_link(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


def a_link_to_a_stale_socket(path: Path) -> None:
    bound(path.parent / "target").close()
    path.symlink_to(path.parent / "target")


def a_link_to_itself(path: Path) -> None:
    path.symlink_to(path)


def a_stale_socket_of_another_mode(path: Path) -> None:
    bound(path, mode=0o660).close()


WAYS_IN: Final[list[Callable[[Path], None]]] = [
    a_file,
    an_empty_file_of_its_mode,
    a_folder,
    a_fifo,
    a_link_to_a_file,
    a_dangling_link,
    a_link_to_a_stale_socket,
    a_link_to_itself,
    a_stale_socket_of_another_mode,
]


@SERVERS
@pytest.mark.parametrize("prepare", WAYS_IN)
def test_what_is_in_the_way_stays(tmp_path: Path, kind: str, prepare: Callable[[Path], None]) -> None:
    path = tmp_path / "s"
    prepare(path)
    before = snapshot(tmp_path)
    with pytest.raises(InvalidArgument, match="is there") as caught:
        make(kind, path)
    assert "\n" not in str(caught.value)
    assert snapshot(tmp_path) == before


@SERVERS
@pytest.mark.parametrize("listening", [True, False])
@pytest.mark.parametrize("type_", [socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_a_socket_in_use_stays(tmp_path: Path, kind: str, listening: bool, type_: int) -> None:
    """Of any type, bound and not yet listening included: another server is about to begin."""
    path = tmp_path / "s"
    with bound(path, listening=listening and type_ != socket.SOCK_DGRAM, kind=type_):
        before = snapshot(tmp_path)
        with pytest.raises(InvalidArgument, match="another server is there"):
            make(kind, path)
        assert snapshot(tmp_path) == before


@SERVERS
def test_a_stale_socket_of_another_user_stays(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this were another user: the file is not ours, however stale."""
    path = tmp_path / "s"
    bound(path).close()
    before = snapshot(tmp_path)
    other = os.geteuid() + 1
    monkeypatch.setattr(endpoint.os, "geteuid", lambda: other)
    with pytest.raises(InvalidArgument, match="a socket of another program"):
        make(kind, path)
    assert snapshot(tmp_path) == before


@SERVERS
def test_a_stale_socket_of_ours_goes(tmp_path: Path, kind: str) -> None:
    """What a killed server left, under a name of any length."""
    for name in ("s", "x" * (MAX_PATH_BYTES - len(str(tmp_path)) - 1)):
        bound(tmp_path / name, listening=True).close()
        make(kind, tmp_path / name).close()
        assert snapshot(tmp_path) == {}


@SERVERS
def test_two_servers_that_start_at_once(tmp_path: Path, kind: str) -> None:
    """Over one stale socket: one serves, the others say so, and nobody's new socket is taken for a stale one."""
    for _ in range(5):
        path = tmp_path / "s"
        bound(path).close()
        made: list[PeerServer] = []
        refused: list[str] = []
        gate = threading.Barrier(4)
        threads = [threading.Thread(target=start, args=(kind, path, gate, made, refused)) for _ in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert len(made) == 1
        assert all("another server is there" in each for each in refused)
        made[0].close()
        assert snapshot(tmp_path) == {}


def start(kind: str, path: Path, gate: threading.Barrier, made: list[PeerServer], refused: list[str]) -> None:
    gate.wait()
    try:
        made.append(make(kind, path))
    except InvalidArgument as error:
        refused.append(str(error))


# --- races with somebody who may write into the folder ---------------------------------------------------------------


@SERVERS
def test_a_file_that_appears_between_looking_and_binding_stays(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    bind = socket.socket.bind

    def late(self: socket.socket, address: bytes) -> None:
        path.write_text("somebody else's")
        bind(self, address)

    monkeypatch.setattr(socket.socket, "bind", late)
    with pytest.raises(InvalidArgument, match="a file is there"):
        make(kind, path)
    assert path.read_text() == "somebody else's"


@SERVERS
def test_a_socket_that_is_replaced_before_it_listens_is_not_taken_for_ours(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "s"
    bind = socket.socket.bind

    def replaced(self: socket.socket, address: bytes) -> None:
        bind(self, address)
        path.unlink()
        path.write_text("somebody else's")

    monkeypatch.setattr(socket.socket, "bind", replaced)
    with pytest.raises(InvalidArgument, match="a file is there"):
        make(kind, path)
    assert path.read_text() == "somebody else's"


@SERVERS
def test_a_folder_that_is_replaced_while_we_look_loses_nothing(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look and the removal the folder becomes a link to another, with a file of the same name."""
    inside, elsewhere = tmp_path / "inside", tmp_path / "elsewhere"
    inside.mkdir()
    elsewhere.mkdir()
    (elsewhere / "s").write_text("precious")
    bound(inside / "s").close()
    look = endpoint._is_stale  # pyright: ignore[reportPrivateUsage]

    def swap(status: os.stat_result, path: str) -> bool:
        stale = look(status, path)
        inside.rename(tmp_path / "moved")
        inside.symlink_to(elsewhere)
        return stale

    monkeypatch.setattr(endpoint, "_is_stale", swap)
    with pytest.raises(InvalidArgument, match="a file is there"):
        make(kind, inside / "s")
    assert (elsewhere / "s").read_text() == "precious"


@SERVERS
@pytest.mark.parametrize("what", ["file", "socket", "link", "folder"])
def test_what_took_our_place_while_we_served_stays(tmp_path: Path, kind: str, what: str) -> None:
    path = tmp_path / "s"
    server = make(kind, path)
    path.unlink()
    other: socket.socket | None = None
    if what == "file":
        path.write_text("somebody else's")
    elif what == "socket":
        other = bound(path, listening=True)
    elif what == "link":
        (tmp_path / "target").write_text("target")
        path.symlink_to("target")
    else:
        path.mkdir()
    before = snapshot(tmp_path)
    server.close()
    assert snapshot(tmp_path) == before
    if other is not None:
        other.close()


def test_our_file_goes_before_its_inode_can_be_anothers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the socket is open no other file has its inode, so it is closed after the file was looked at."""
    path = tmp_path / "s"
    made = Endpoint(path)
    seen: list[bool] = []
    close = socket.socket.close

    def closing_(self: socket.socket) -> None:
        seen.append(path.exists())
        close(self)

    monkeypatch.setattr(socket.socket, "close", closing_)
    made.close()
    assert seen == [False]


@SERVERS
def test_a_folder_that_somebody_keeps_locked_keeps_nobody(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the lock no stale socket is looked for: a new path works, an old one is said to be taken."""
    monkeypatch.setattr(endpoint, "_LOCK_SECONDS", 0.05)
    bound(tmp_path / "old").close()
    fd = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        make(kind, tmp_path / "new").close()
        with pytest.raises(InvalidArgument, match="a socket of another program is there"):
            make(kind, tmp_path / "old")
    finally:
        os.close(fd)
    make(kind, tmp_path / "old").close()


# --- what a peer can make a server say -----------------------------------------------------------------------------


def test_who_is_refused_for_ever_gets_a_few_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving("vhost-user", tmp_path / "s"), FrontEnd(tmp_path / "s", timeout=PATIENCE) as front:
        front.negotiate()
        for _ in range(500):
            front.send(Request.SET_VRING_NUM, VringState(9, 1), need_reply=True)
            assert front.receive().payload == U64(1)
        lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == 21
    assert lines[-1] == "more of it is answered and not told"


@pytest.mark.parametrize("transport", ["vhost-user", "pci"])
def test_connections_without_end_do_not_fill_a_log(tmp_path: Path, transport: str) -> None:
    """`serve` writes as many lines as a person can read, and says how many are missing."""
    path, log = tmp_path / "s", tmp_path / "log"
    with log.open("wb") as err:
        process = subprocess.Popen(
            [*COMMAND, "serve", "--socket", str(path), "--transport", transport], stdout=subprocess.DEVNULL, stderr=err
        )
        try:
            assert eventually(lambda: b"serving" in log.read_bytes())  # the socket is there before it listens
            begin, count, spent = time.monotonic(), 0, 0.0
            while count < 2200 + 21 * spent:  # a slow machine is given its lines back meanwhile
                count, spent = count + 1, time.monotonic() - begin
                with socket.socket(socket.AF_UNIX) as each:
                    each.connect(str(path))
                    each.sendall(b"\xff" * 16)
                    each.settimeout(PATIENCE)
                    try:
                        each.recv(1)
                    except ConnectionResetError:
                        continue
            time.sleep(0.2)
            with socket.socket(socket.AF_UNIX) as each:
                each.connect(str(path))
            assert eventually(lambda: b"lines of the log are missing" in log.read_bytes())
        finally:
            process.terminate()
            assert process.wait(PATIENCE) == 0
    assert len(log.read_bytes().splitlines()) < 2020 + 21 * (spent + 2)


def test_a_client_waits_for_its_place(tmp_path: Path) -> None:
    """While one is served and the backlog is full: as long as it is willing to, and then it says why not."""
    path = tmp_path / "s"
    with serving("vfio-user", path) as server, ExitStack() as stack:
        for number in range(6):
            each = stack.enter_context(socket.socket(socket.AF_UNIX))
            assert number == 0 or eventually(lambda: server.sessions == 1)
            each.settimeout(0.0)
            with suppress(BlockingIOError):
                each.connect(str(path))
        with pytest.raises(BlockingIOError):
            VfioUserClient(path, memory=GuestMemory([(0, 4096)]), timeout=0.1)
        gone = threading.Timer(0.2, stack.close)
        gone.start()
        assert ask("vfio-user", path)
        gone.join()
