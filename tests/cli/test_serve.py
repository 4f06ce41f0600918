"""``virtio-test serve`` as a command: start, stop, and every bad socket in one line with nothing left behind."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from .conftest import COMMAND, Run


@contextmanager
def serving(*arguments: str) -> Generator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [*COMMAND, "serve", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("virtio-test: serving the test device on ")
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_and_removes_the_socket(tmp_path: Path, number: signal.Signals) -> None:
    path = tmp_path / "s"
    with serving("--socket", str(path)) as process:
        assert path.is_socket()
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out, err) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_it_survives_a_front_end_that_goes(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with serving("--socket", str(path)) as process:
        for _ in range(3):
            with socket.socket(socket.AF_UNIX) as front_end:
                front_end.connect(str(path))
        with socket.socket(socket.AF_UNIX) as front_end:
            front_end.connect(str(path))
            front_end.settimeout(30)
            front_end.sendall((1).to_bytes(4, "little") + (1).to_bytes(4, "little") + bytes(4))
            reply = front_end.recv(20)
        assert int.from_bytes(reply[:4], "little") == 1
        assert int.from_bytes(reply[12:], "little") & 1, "CAN_PRINT"
        assert process.poll() is None


@pytest.mark.parametrize(("arguments", "packed"), [((), True), (("--features", "-RING_PACKED"), False)])
def test_features_are_offered_as_told(tmp_path: Path, arguments: tuple[str, ...], packed: bool) -> None:
    path = tmp_path / "s"
    with serving("--socket", str(path), *arguments), socket.socket(socket.AF_UNIX) as front_end:
        front_end.connect(str(path))
        front_end.settimeout(30)
        front_end.sendall((1).to_bytes(4, "little") + (1).to_bytes(4, "little") + bytes(4))
        assert bool(int.from_bytes(front_end.recv(20)[12:], "little") >> 34 & 1) == packed


def test_a_second_server_on_one_path(tmp_path: Path, spawn: Run) -> None:
    path = tmp_path / "s"
    with serving("--socket", str(path)) as process:
        refused(spawn("serve", "--socket", str(path)), str(path))
        assert path.is_socket()
        assert process.poll() is None
        with socket.socket(socket.AF_UNIX) as front_end:
            front_end.connect(str(path))


def test_the_timer_starts_with_the_server(tmp_path: Path) -> None:
    arguments = ("--socket", str(tmp_path / "s"), "--timer", "--first-after", "0.1", "--every", "0.1")
    with serving(*arguments) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "==============set config:0\n"
        assert process.stdout.readline() == "==============set config:1\n"


def test_it_goes_on_without_a_reader_of_its_console(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with serving("--socket", str(path), "--timer", "--first-after", "0.1", "--every", "0.05") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        process.stdout = None
        assert "nobody reads" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.stderr.read() == ""
        assert process.wait(timeout=30) == 0
    assert not path.exists()


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_does_not_read_holds_nothing_up(tmp_path: Path, stream: str) -> None:
    """Neither a front-end nor the signal that stops it."""
    path = tmp_path / "s"
    read, write = os.pipe()
    other = "stderr" if stream == "stdout" else "stdout"
    streams = {stream: write, other: subprocess.DEVNULL}
    process = subprocess.Popen(
        [*COMMAND, "serve", "--socket", str(path), "--timer", "--first-after", "0", "--every", "0.00002"],
        stdout=streams["stdout"],
        stderr=streams["stderr"],
    )
    os.close(write)
    try:
        deadline = time.monotonic() + 30
        with socket.socket(socket.AF_UNIX) as front_end:
            # The file is there a moment before anybody listens.
            while front_end.connect_ex(str(path)):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            front_end.settimeout(30)
            for _ in range(2000):
                # An unknown request that wants an answer: one line of the log each.
                front_end.sendall(struct.pack("=III", 1000, 9, 0))
                assert len(front_end.recv(20)) == 20
        if stream == "stdout":
            # Until the device's lines have filled the pipe.
            before, filled = -1, 0
            while before != filled or filled < 60_000:
                assert time.monotonic() < deadline
                time.sleep(0.1)
                before = filled
                filled = int.from_bytes(fcntl.ioctl(read, termios.FIONREAD, bytes(4)), sys.byteorder)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
        assert not path.exists()
    finally:
        process.kill()
        process.wait()
        os.close(read)


@pytest.mark.parametrize("closed", ["1", "2"])
def test_it_serves_without_stdout_or_stderr(tmp_path: Path, closed: str) -> None:
    path = tmp_path / "s"
    command = [*COMMAND, "serve", "--socket", str(path), "--timer", "--first-after", "0", "--every", "0.01"]
    # exec in the shell: the file is closed before the interpreter starts.
    process = subprocess.Popen(["/bin/sh", "-c", f'exec "$@" {closed}>&-', "sh", *command], stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 30
        while not path.exists():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.1)
        with socket.socket(socket.AF_UNIX) as front_end:
            front_end.connect(str(path))
            front_end.settimeout(30)
            front_end.sendall(struct.pack("=III", 1, 1, 0))
            assert len(front_end.recv(20)) == 20
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
        assert b"Traceback" not in err
        assert process.returncode == 0
        assert not path.exists()
    finally:
        process.kill()
        process.communicate()


def refused(result: object, *says: str) -> None:
    status, out, err = (getattr(result, name) for name in ("status", "out", "err"))
    assert (status, out) == (2, "")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    for each in says:
        assert each in err


def test_somebody_elses_file_is_not_removed(tmp_path: Path, spawn: Run) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    refused(spawn("serve", "--socket", str(path)), str(path))
    assert path.read_text() == "precious"


def test_bad_sockets_leave_nothing_behind(tmp_path: Path, spawn: Run) -> None:
    for path in (tmp_path / "none" / "s", tmp_path / ("long" * 40), tmp_path):
        refused(spawn("serve", "--socket", str(path)), str(path))
    refused(spawn("serve", "--socket", ""), "give")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "--socket"),
        (["--socket", "S", "--fd", "3"], "one of the two"),
        (["--socket", "S", "--features", "RING_PACKED"], "write +NAME"),
        (["--socket", "S", "--features", "+NOTHING"], "unknown feature 'NOTHING'"),
        (["--socket", "S", "--features", "+SR_IOV"], "SR_IOV"),
        (["--socket", "S", "--features", "-VERSION_1"], "VERSION_1"),
        (["--socket", "S", "--device", "gpu"], "'gpu'"),
        (["--socket", "S", "--policy", "mild"], "'mild' is not one of 'interop', 'strict'"),
        (["--fd", "2000"], "fd 2000"),
    ],
)
def test_bad_options(tmp_path: Path, spawn: Run, arguments: list[str], says: str) -> None:
    path = tmp_path / "s"
    refused(spawn("serve", *(str(path) if each == "S" else each for each in arguments)), says)
    assert list(tmp_path.iterdir()) == []
