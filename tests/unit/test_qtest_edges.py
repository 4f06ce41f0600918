"""Where what the qtest carrier takes begins and ends: each number, and the next one.

Its QEMU answers every command alike, and says what the test tells it to.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from virtio_test.carrier.qtest import QemuProcess, Qtest, QtestMachine, protocol
from virtio_test.carrier.qtest.pci import PciBus
from virtio_test.errors import InvalidArgument, PeerError, PeerTimeout, StateError
from virtio_test.loop import OwnerLoop

ANSWERS = """
import socket, sys
fd = int([word for word in sys.argv if "fd=" in word][0].split("fd=")[1])
with socket.socket(fileno=fd) as channel:
    answer = b"0x8"
    for line in channel.makefile("rb"):
        words = line.split()
        if words[:2] == [b"writel", b"0x0"]:
            answer = words[2]
        if words[:2] in ([b"writel", b"0x4"], [b"writel", b"0x8"]):
            what = b"raise" if words[1] == b"0x4" else b"lower"
            channel.sendall(b"IRQ %s %d\\n" % (what, int(words[2], 16)))
        channel.sendall(b"OK " + answer + b"\\n")
"""
COMMAND = [sys.executable, "-S", "-c", ANSWERS]
MIB = 1 << 20


@pytest.fixture(scope="module")
def q35() -> Iterator[QtestMachine]:
    with QtestMachine(COMMAND, machine="q35", ram=2 * MIB, loop=OwnerLoop()) as made:
        yield made


@pytest.fixture(scope="module")
def microvm() -> Iterator[QtestMachine]:
    with QtestMachine(COMMAND, machine="microvm", ram=2 * MIB) as made:
        yield made


# --- the machine ----------------------------------------------------------------------------------------------


def test_each_machine_has_its_own_bus(q35: QtestMachine, microvm: QtestMachine) -> None:
    with pytest.raises(StateError, match="no virtio-mmio transports"):
        q35.mmio(0)
    with pytest.raises(StateError, match="no PCI bus"):
        microvm.pci(0)


def test_a_line_is_told_while_it_is_raised_and_heard(q35: QtestMachine) -> None:
    heard: list[int] = []
    deliver = q35._deliver_lines  # pyright: ignore[reportPrivateUsage]
    q35.watch_line("me", lambda: True, lambda: heard.append(1))
    assert (q35.raised(5), deliver()) == (False, False)
    q35.qtest.write_memory(4, 4, 5)
    assert (q35.raised(5), q35.raised(6), deliver()) == (True, False, True)
    q35.leave_line("me")
    assert (heard, deliver()) == ([1], False)
    q35.watch_line("me", lambda: True, lambda: heard.append(2))
    q35.qtest.write_memory(8, 4, 5)
    assert (q35.raised(5), deliver(), heard) == (False, False, [1])
    q35.leave_line("me")
    q35.loop.unpend((q35, "lines"))


def test_as_many_messages_as_there_are_words(q35: QtestMachine) -> None:
    free = list(q35._free_words)  # pyright: ignore[reportPrivateUsage]
    assert len(free) == 16384
    last = q35.take_word(lambda: None)
    q35._free_words.clear()  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(StateError, match="all 16384 words"):
        q35.take_word(lambda: None)
    q35.drop_word(last)
    assert q35.take_word(lambda: None) == last
    q35.drop_word(last)


@pytest.mark.parametrize("ram", [2 * MIB, 3 * MIB, 1 << 30])
def test_sizes_that_a_machine_can_have(ram: int) -> None:
    with QemuProcess(["true"], ram=ram) as process:
        assert process.ram_path.stat().st_size == ram
    assert not process.running


@pytest.mark.parametrize("ram", [0, MIB, 2 * MIB + 4096, 2 * MIB - 1, (1 << 30) + MIB])
def test_sizes_that_no_machine_has(ram: int) -> None:
    with pytest.raises(InvalidArgument, match=f"{ram} bytes of RAM"):
        QemuProcess(["true"], ram=ram)


# --- transports of the page -----------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 7])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_accesses_of_a_page_to_its_end(microvm: QtestMachine, index: int, size: int) -> None:
    page = microvm.mmio(index)
    for offset in (0, 512 - size):
        assert page.read(offset, size) == 8
        page.write(offset, size, 0)
    for offset in (-1, -size, 513 - size, 512):
        with pytest.raises(InvalidArgument, match=f"{size} bytes at {offset:#x} of a transport"):
            page.read(offset, size)
        with pytest.raises(InvalidArgument, match=f"{size} bytes at {offset:#x} of a transport"):
            page.write(offset, size, 0)


@pytest.mark.parametrize("index", [-1, 8])
def test_transports_that_a_machine_does_not_have(microvm: QtestMachine, index: int) -> None:
    with pytest.raises(InvalidArgument, match=f"transport {index}; microvm has 0 to 7"):
        microvm.mmio(index)


# --- functions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slot", "function"), [(0, 0), (31, 7), (0, 7), (31, 0)])
def test_functions_of_a_bus(q35: QtestMachine, slot: int, function: int) -> None:
    assert repr(q35.pci(slot, function)).startswith(f"<QtestPci {slot:02x}.{function}")


@pytest.mark.parametrize(("slot", "function"), [(-1, 0), (32, 0), (0, -1), (0, 8)])
def test_functions_that_no_bus_has(q35: QtestMachine, slot: int, function: int) -> None:
    with pytest.raises(InvalidArgument, match=f"slot {slot} function {function}"):
        q35.pci(slot, function)


@pytest.mark.parametrize("io", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_accesses_of_a_bar_to_its_end(q35: QtestMachine, size: int, *, io: bool) -> None:
    device = q35.pci(3)
    with pytest.raises(StateError, match="BAR 1 has no address"):
        device.read_bar(1, 0, size)
    device.place_bar(1, 64, io=io)
    for offset in (0, 64 - size):
        assert device.read_bar(1, offset, size) == 8
        device.write_bar(1, offset, size, 0)
    for offset in (-1, -size, 65 - size, 64):
        with pytest.raises(InvalidArgument, match=f"{size} bytes at {offset:#x} of BAR 1"):
            device.read_bar(1, offset, size)


def test_a_bus_gives_away_all_of_its_room(q35: QtestMachine) -> None:
    bus = PciBus(q35.qtest, "q35")
    assert bus.allocate(0x2000_0000, io=False) == 0xC000_0000
    assert bus.allocate(0x1000_0000, io=False) == 0xE000_0000
    for size in (0x0800_0000, 0x0400_0000, 0x0200_0000):
        bus.allocate(size, io=False)
    with pytest.raises(StateError, match=r"no room .* of memory"):
        bus.allocate(4096, io=False)
    assert [bus.allocate(0x2000, io=True) for _ in range(2)] == [0xC000, 0xE000]
    with pytest.raises(StateError, match=r"no room .* of I/O"):
        bus.allocate(4, io=True)


def test_whose_line_it_is_stands_in_its_status(q35: QtestMachine) -> None:
    device, heard = q35.pci(4), list[str]()
    device.listen(message=lambda _: None, line=lambda: heard.append("line"))
    q35.qtest.write_memory(4, 4, 5)
    q35._deliver_lines()  # pyright: ignore[reportPrivateUsage]
    assert heard == ["line"]
    q35.qtest.write_memory(0, 4, 0x10)
    q35._deliver_lines()  # pyright: ignore[reportPrivateUsage]
    assert heard == ["line"]
    q35.qtest.write_memory(0, 4, 8)
    q35.qtest.write_memory(8, 4, 5)
    device.close()
    q35.loop.unpend((q35, "lines"))


# --- the protocol ---------------------------------------------------------------------------------------------


@pytest.fixture
def ends() -> Iterator[tuple[Qtest, socket.socket]]:
    ours, theirs = socket.socketpair()
    qtest = Qtest(ours, timeout=5.0)
    with theirs:
        yield qtest, theirs
    qtest.close()


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_numbers_that_an_access_gives(ends: tuple[Qtest, socket.socket], size: int) -> None:
    qtest, theirs = ends
    for number in (0, (1 << 8 * size) - 1):
        theirs.sendall(f"OK {number:#x}\n".encode())
        assert qtest.read_memory(0, size) == number
    for number in (-1, 1 << 8 * size):
        theirs.sendall(f"OK {number:#x}\n".encode())
        with pytest.raises(PeerError, match=f"more than {size} bytes"):
            qtest.read_memory(0, size)


def test_an_answer_that_is_there_when_the_time_is_over_is_late(
    ends: tuple[Qtest, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    qtest, theirs = ends
    monkeypatch.setattr(protocol, "time", SimpleNamespace(monotonic=lambda: 1.0))
    theirs.sendall(b"OK 0x1\n")
    qtest.timeout = 0.0
    with pytest.raises(PeerTimeout):
        qtest.read_memory(0, 1)


@pytest.mark.parametrize(("length", "fits"), [(100, True), (101, False)])
def test_the_longest_line(
    ends: tuple[Qtest, socket.socket], monkeypatch: pytest.MonkeyPatch, length: int, *, fits: bool
) -> None:
    qtest, theirs = ends
    monkeypatch.setattr(protocol, "_MAX_LINE", 100)
    theirs.sendall(b"OK 0x1".ljust(length - 1) + b"\n")
    if fits:
        assert qtest.read_memory(0, 1) == 1
    else:
        with pytest.raises(PeerError, match="more than 100 bytes"):
            qtest.read_memory(0, 1)
