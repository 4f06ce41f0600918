"""Socket paths: whatever is wrong is one line that says what, where and what to do, and nobody's file is touched."""

from __future__ import annotations

import os
import socket
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from virtio_test.errors import InvalidArgument
from virtio_test.sockets.endpoint import MAX_PATH_BYTES, Endpoint


def bound(path: Path, *, mode: int | None = None, listening: bool = False) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.bind(str(path))
    if mode is not None:
        path.chmod(mode)
    if listening:
        made.listen(1)
    return made


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {each.name: (each.lstat().st_ino, each.lstat().st_mode) for each in folder.iterdir()}


def test_a_socket_is_made_for_this_user_alone_and_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    old = os.umask(0)
    try:
        endpoint = Endpoint(path)
    finally:
        os.umask(old)
    assert stat.S_IMODE(path.lstat().st_mode) == 0o600
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(path))
    endpoint.close()
    endpoint.close()
    assert snapshot(tmp_path) == {}


def folder_in_the_way(path: Path) -> None:
    path.mkdir()


def file_in_the_way(path: Path) -> None:
    path.write_text("mine")


def link_in_the_way(path: Path) -> None:
    path.symlink_to(path.parent / "target")


def link_to_a_socket(path: Path) -> None:
    bound(path.parent / "target", mode=0o600).close()
    path.symlink_to(path.parent / "target")


def foreign_socket(path: Path) -> None:
    bound(path, mode=0o755).close()


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (folder_in_the_way, "a folder is there"),
        (file_in_the_way, "a file is there"),
        (link_in_the_way, "a symbolic link is there"),
        (link_to_a_socket, "a symbolic link is there"),
        (foreign_socket, "a socket of another program is there"),
    ],
)
def test_what_is_in_the_way_is_left_alone(tmp_path: Path, prepare: Callable[[Path], None], says: str) -> None:
    path = tmp_path / "s"
    prepare(path)
    before = snapshot(tmp_path)
    with pytest.raises(InvalidArgument) as caught:
        Endpoint(path)
    text = str(caught.value)
    assert says in text
    assert str(path) in text
    assert "give another path" in text
    assert "\n" not in text
    assert snapshot(tmp_path) == before


def test_a_second_server_on_one_path_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "s"
    first = Endpoint(path)
    before = snapshot(tmp_path)
    with pytest.raises(InvalidArgument, match="another server is there"):
        Endpoint(path)
    assert snapshot(tmp_path) == before
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.connect(str(path))
    first.close()
    assert snapshot(tmp_path) == {}


def test_the_socket_of_a_killed_server_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    bound(path, mode=0o600, listening=True).close()
    endpoint = Endpoint(path)
    endpoint.close()
    assert snapshot(tmp_path) == {}


def test_a_file_that_took_our_place_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    endpoint = Endpoint(path)
    path.unlink()
    path.write_text("somebody else's")
    endpoint.close()
    assert path.read_text() == "somebody else's"


def test_it_removes_its_own_file_after_a_change_of_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    endpoint = Endpoint("s")
    monkeypatch.chdir("/")
    endpoint.close()
    assert snapshot(tmp_path) == {}


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("", "is no path"),
        ("a\0b", "is no path"),
        ("/nowhere/at/all/s", "no such folder; create it"),
        ("/dev/null/s", "a part of the path is no folder"),
        ("/" + "x" * MAX_PATH_BYTES, f"has {MAX_PATH_BYTES + 1} bytes"),
        ("/proc/s", "/proc cannot hold a socket; give another path"),
    ],
)
def test_an_impossible_path_is_one_line(path: str, says: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Endpoint(path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", [0o555, 0o444, 0o000])
def test_a_folder_that_is_not_writable(mode: int) -> None:
    # Not in tmp_path: as root the test becomes another user, who must be able to come as far as the folder.
    with tempfile.TemporaryDirectory() as top:
        Path(top).chmod(0o755)
        folder = Path(top) / "closed"
        folder.mkdir()
        folder.chmod(mode)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            with pytest.raises(InvalidArgument) as caught:
                Endpoint(folder / "s")
        finally:
            if root:
                os.seteuid(0)
        assert str(caught.value).endswith("the folder is not writable for this user; give another path")
        folder.chmod(0o755)
        assert snapshot(folder) == {}


def test_the_longest_path_works(tmp_path: Path) -> None:
    name = "x" * (MAX_PATH_BYTES - len(str(tmp_path)) - 1)
    endpoint = Endpoint(tmp_path / name)
    endpoint.close()
    with pytest.raises(InvalidArgument, match="give a shorter one"):
        Endpoint(tmp_path / (name + "x"))


def test_a_given_fd_is_a_unix_stream_socket(tmp_path: Path) -> None:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    endpoint = Endpoint(fd=one.detach())
    assert endpoint.connected is not None
    assert endpoint.listener is None
    endpoint.close()
    assert other.recv(1) == b""
    other.close()

    listening = bound(tmp_path / "s", listening=True)
    endpoint = Endpoint(fd=listening.detach())
    assert endpoint.listener is not None
    endpoint.close()
    assert (tmp_path / "s").exists()  # the launcher's file, not ours


def test_another_fd_is_refused_and_stays_open(tmp_path: Path) -> None:
    plain = os.open(tmp_path, os.O_RDONLY)
    with (
        socket.socket(socket.AF_INET, socket.SOCK_STREAM) as wrong,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as packets,
    ):
        for fd in (plain, wrong.fileno(), datagrams.fileno(), packets.fileno()):
            with pytest.raises(InvalidArgument, match="UNIX stream socket"):
                Endpoint(fd=fd)
            os.fstat(fd)
    os.close(plain)
    with pytest.raises(InvalidArgument, match="no socket"):
        Endpoint(fd=9999)
    with pytest.raises(InvalidArgument, match="either"):
        Endpoint()
