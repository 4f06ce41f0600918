"""QEMU's test protocol, spoken by somebody who may say anything: answers are judged, and never waited for for ever."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Generator, Iterable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtio_test.carrier.qtest import QemuProcess, Qtest, QtestMachine, halting_firmware
from virtio_test.clock import VirtualClock
from virtio_test.errors import InvalidArgument, PeerDisconnected, PeerError, PeerTimeout, StateError
from virtio_test.loop import OwnerLoop


class Scripted:
    """A client whose QEMU answers each command with the next text, whatever it was asked."""

    def __init__(self, answers: Iterable[bytes | None], timeout: float) -> None:
        ours, self.theirs = socket.socketpair()
        self.events: list[tuple[int, bool]] = []
        self.asked: list[str] = []
        self.qtest = Qtest(
            ours,
            timeout=timeout,
            on_irq=lambda line, raised: self.events.append((line, raised)),
            last_words=lambda: "it said goodbye",
        )
        self._answers = list(answers)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            stream = self.theirs.makefile("rb")
            for answer in self._answers:
                line = stream.readline()
                if not line:
                    return
                self.asked.append(line.decode().rstrip("\n"))
                if answer is None:
                    self.theirs.shutdown(socket.SHUT_RDWR)
                    return
                self.theirs.sendall(answer)

    def close(self) -> None:
        self.qtest.close()
        with contextlib.suppress(OSError):
            self.theirs.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self.theirs.close()


@contextlib.contextmanager
def scripted(*answers: bytes | None, timeout: float = 5.0) -> Generator[Scripted]:
    made = Scripted(answers, timeout)
    try:
        yield made
    finally:
        made.close()


def test_accesses_are_one_line_each() -> None:
    ok, number = b"OK\n", b"OK 0x00000000000000ff\n"
    with scripted(*[number] * 4, *[ok] * 4, *[number] * 3, *[ok] * 6) as it:
        assert [it.qtest.read_memory(0x1000, size) for size in (1, 2, 4, 8)] == [255] * 4
        for size in (1, 2, 4, 8):
            it.qtest.write_memory(0x1000, size, 17)
        assert [it.qtest.read_port(0xCFC, size) for size in (1, 2, 4)] == [255] * 3
        for size in (1, 2, 4):
            it.qtest.write_port(0xCF8, size, 17)
        it.qtest.intercept("ioapic")
        it.qtest.step_clock()
        it.qtest.step_clock(1000)
        reads = [f"read{width} 0x1000" for width in "bwlq"] + [f"write{width} 0x1000 0x11" for width in "bwlq"]
        ports = [f"in{width} 0xcfc" for width in "bwl"] + [f"out{width} 0xcf8 0x11" for width in "bwl"]
        assert it.asked == [*reads, *ports, "irq_intercept_in ioapic", "clock_step", "clock_step 1000"]


def test_events_come_before_with_and_after_answers() -> None:
    with scripted(b"IRQ raise 10\nIRQ lower 10\nOK 0x1\nIRQ raise 11\nIRQ ra", b"ise 12\nOK\n") as it:
        assert it.qtest.read_port(1, 1) == 1
        assert it.events == [(10, True), (10, False), (11, True)]
        it.qtest.write_port(1, 1, 1)
        assert it.events[3:] == [(12, True)]
        it.theirs.sendall(b"IRQ lower 12\nIRQ lower 11\nIRQ")
        deadline = time.monotonic() + 5
        while len(it.events) < 6 and time.monotonic() < deadline:
            it.qtest.take_events()
        assert it.events[4:] == [(12, False), (11, False)]


@pytest.mark.parametrize("answer", [b"FAIL Unknown command 'inb'\n", b"ERR nothing\n"])
def test_a_command_that_is_refused(answer: bytes) -> None:
    with scripted(answer, b"OK 0x2\n") as it:
        with pytest.raises(StateError, match="QEMU refuses 'inb 0x1'"):
            it.qtest.read_port(1, 1)
        assert it.qtest.read_port(1, 1) == 2


@pytest.mark.parametrize(
    "answer",
    [
        b"OK\n",
        b"OK 0x100\n",
        b"OK -1\n",
        b"OK zero\n",
        b"\n",
        b"hello\n",
        b"IRQ raise -1\n",
        b"IRQ explode 1\n",
        b"\xff\xfe\n",
        b"OK 0x1\nOK 0x1\n",
        b"x" * (3 << 20),
    ],
)
def test_what_is_no_answer(answer: bytes) -> None:
    with scripted(answer) as it, pytest.raises(PeerError):
        it.qtest.read_port(1, 1)


def test_who_is_gone_stays_gone() -> None:
    with scripted(None) as it:
        with pytest.raises(PeerDisconnected, match=r"QEMU is gone \(.*\); its last words: it said goodbye"):
            it.qtest.read_port(1, 1)
        with pytest.raises(PeerDisconnected):
            it.qtest.write_port(1, 1, 1)
        with pytest.raises(PeerDisconnected):
            it.qtest.take_events()
    with scripted() as it:
        it.qtest.close()
        assert it.qtest.fileno() == -1
        with pytest.raises(PeerDisconnected):
            it.qtest.read_port(1, 1)


def test_who_does_not_answer_is_given_up() -> None:
    with scripted(b"IRQ raise 1\n", timeout=0.1) as it:
        start = time.monotonic()
        with pytest.raises(PeerTimeout, match=r"'inb 0x1' within 0\.1 s"):
            it.qtest.read_port(1, 1)
        assert time.monotonic() - start < 2
        # What it says later would be taken for the answer to another question.
        with pytest.raises(PeerDisconnected):
            it.qtest.read_port(1, 1)


def test_events_without_end_are_no_answer_either() -> None:
    ours, theirs = socket.socketpair()
    over = threading.Event()

    def talk() -> None:
        with contextlib.suppress(OSError):
            while not over.wait(0.01):
                theirs.sendall(b"IRQ raise 1\nIRQ lower 1\n")

    thread = threading.Thread(target=talk)
    thread.start()
    # Ends the test, not the wait that is looked at: that has its own bound.
    guard = threading.Timer(10.0, over.set)
    guard.start()
    qtest = Qtest(ours, timeout=0.3)
    start = time.monotonic()
    with pytest.raises(PeerTimeout, match=r"'inb 0x1' within 0\.3 s"):
        qtest.read_port(1, 1)
    assert time.monotonic() - start < 5
    over.set()
    guard.cancel()
    qtest.close()
    theirs.close()
    thread.join()


def test_after_what_is_no_line_of_the_protocol_no_answer_is_taken_for_another() -> None:
    with scripted(b"what?\nOK 0x7\n", b"OK 0x2\n") as it:
        with pytest.raises(PeerError, match="'what\\?'"):
            it.qtest.read_port(1, 1)
        with pytest.raises(PeerDisconnected, match="none of its test protocol"):
            it.qtest.read_port(2, 1)


@given(
    st.lists(st.one_of(st.binary(max_size=40), st.sampled_from([b"OK\n", b"OK 0x1\n", b"IRQ raise 1\n"])), max_size=5)
)
def test_any_bytes_end_in_an_answer_or_an_error(answers: list[bytes]) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(b"".join(answers))
        theirs.shutdown(socket.SHUT_WR)
        qtest = Qtest(ours, timeout=5.0)
        try:
            for _ in range(4):
                assert 0 <= qtest.read_port(1, 1) <= 0xFF
        except (PeerError, StateError):
            pass
        finally:
            qtest.close()


# --- the process ----------------------------------------------------------------------------------------------


def test_the_firmware_halts() -> None:
    image = halting_firmware()
    assert len(image) == 64 << 10
    assert image[-16:-12] == bytes([0xFA, 0xF4, 0xEB, 0xFD]), "cli; hlt; back by 3 to the hlt"


SPEAKER = """
import os, sys
fd = int([word for word in sys.argv if "fd=" in word][0].split("fd=")[1])
print("what it said", file=sys.stderr, flush=True)
{body}
"""


def speaker(body: str) -> list[str]:
    return [sys.executable, "-c", SPEAKER.format(body=body)]


def test_a_process_and_its_folder() -> None:
    with QemuProcess(speaker("os.read(fd, 1); os._exit(3)"), ram=2 << 20) as process:
        assert process.running
        assert process.ram_path.stat().st_size == 2 << 20
        process.channel.sendall(b"x")
        assert process.last_words() == "what it said | exit status 3"
        assert not process.running
        assert "ended" in repr(process)
        folder = process.folder
    assert not folder.exists()
    assert process.pid is None


def test_only_the_last_words_of_many_are_read() -> None:
    body = "os.write(2, b'x' * (1 << 20) + b'\\n' + b'the last\\n'); os._exit(3)"
    with QemuProcess(speaker(body), ram=2 << 20) as process:
        assert process.channel.recv(1) == b""
        words = process.last_words()
        assert words.endswith(" | the last | exit status 3")
        assert len(words) < 5000


def test_a_process_is_ended_however_deaf_it_is() -> None:
    body = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); os.write(fd, b'.'); time.sleep(60)"
    process = QemuProcess(speaker(body))
    assert process.channel.recv(1) == b"."
    pid = process.pid
    start = time.monotonic()
    process.close()
    assert time.monotonic() - start < 2
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize(
    "body",
    [
        "os._exit(1)",
        "os.write(fd, b'FAIL no ioapic\\n' * 9); os.read(fd, 99)",
        "os.write(fd, b'what?\\n'); os.read(fd, 9)",
    ],
)
def test_a_machine_that_does_not_come_up_leaves_nothing(
    body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises((PeerError, StateError)):
        QtestMachine(speaker(body), timeout=2.0)
    assert list(tmp_path.iterdir()) == []
    left = [each for each in Path("/proc").glob("[0-9]*/cmdline") if str(tmp_path).encode() in _read(each)]
    assert left == []


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""  # it ended meanwhile


def test_what_cannot_be_started() -> None:
    with pytest.raises(InvalidArgument, match="machine 'virt'"):
        QemuProcess(machine="virt")  # pyright: ignore[reportArgumentType]
    for ram in (0, 4097, 2 << 30):
        with pytest.raises(InvalidArgument, match="bytes of RAM"):
            QemuProcess(ram=ram)
    with pytest.raises(PeerDisconnected, match="cannot be started"):
        QemuProcess(["/nonexistent/qemu"])
    with pytest.raises(InvalidArgument, match="virtual clock"):
        QtestMachine(loop=OwnerLoop(clock=VirtualClock()))
