"""Files of the other side that are cut short while they are mapped here, which must not kill us.

Whoever dies of it takes down a process of its own: cases are functions of this module, which a child runs.
"""

from __future__ import annotations

import faulthandler
import mmap
import os
import re
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from virtio_test._core import DeviceQueue, DriverQueue, GuestMemory, QueueConfig, RingLayout, rules
from virtio_test.carrier.vfio_user.client import VfioUserClient
from virtio_test.errors import PeerError, QueueViolation, RuleViolation

from . import vfio_user_world, vhost_user_world
from .vhost_user_world import BUFFERS, Guest, guest
from .world import PATIENCE, ServerThread, eventually

ROOT = Path(__file__).parents[2]
PAGE = 4096
BYTES = 1 << 20


def child(case: Callable[..., None], *args: str) -> list[str]:
    """The command that runs `case(*args)`, in `ROOT`."""
    return [sys.executable, "-c", f"from {__name__} import {case.__name__} as case; case(*{args!r})"]


def run(case: Callable[..., None], *args: str) -> tuple[int, str]:
    """How a process ended that ran `case(*args)`, and what it complained of."""
    done = subprocess.run(child(case, *args), cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stderr


def lives(case: Callable[..., None], *args: str) -> None:
    assert run(case, *args) == (0, "")


def cut_file(size: int = BYTES) -> int:
    """A file that can be cut short: no seal."""
    fd = os.memfd_create("cut", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    return fd


def cut_memory(*sizes: int) -> tuple[list[int], GuestMemory]:
    """One file for each region, one behind the other."""
    memory, fds, at = GuestMemory(), [cut_file(size) for size in sizes], 0
    for fd, size in zip(fds, sizes, strict=True):
        memory.add_region(at, size, fd=fd)
        at += size
    return fds, memory


def bus_error() -> None:
    """A fault in memory that nobody guards."""
    fd = cut_file(PAGE)
    view = mmap.mmap(fd, PAGE)
    os.ftruncate(fd, 0)
    view[0]


# -------------------------------------------------------------------------------------------------- memory and queues


def each_direct_access() -> None:
    touches: list[Callable[[GuestMemory], object]] = [
        lambda memory: memory.read(0, 16),
        lambda memory: memory.read(0, 2 * PAGE),
        lambda memory: memory.read_into(8, bytearray(8)),
        lambda memory: memory.write(0, b"x"),
        lambda memory: memory.fill(0, PAGE, 1),
        lambda memory: memory.copy(PAGE, 0, 16),
        lambda memory: memory.copy(0, PAGE, 16),
    ]
    for touch in touches:
        (fd, _), memory = cut_memory(PAGE, PAGE)
        memory.fill(0, 2 * PAGE, 7)
        os.ftruncate(fd, 0)
        assert [region.lost for region in memory.regions] == [False, False]
        with pytest.raises(RuleViolation, match="cut short") as caught:
            touch(memory)
        assert not isinstance(caught.value, QueueViolation)
        assert (caught.value.rule, caught.value.clause) == ("MemoryLost", "2.6")
        assert caught.value.address is not None
        assert caught.value.address < PAGE
        assert [region.lost for region in memory.regions] == [True, False]
        assert repr(memory.regions[0]).endswith(", lost>")
        assert memory.read(PAGE + 100, 3) == b"\7\7\7"
        memory.remove_region(0, PAGE)
        memory.add_region(0, PAGE)
        assert memory.read(0, 4) == bytes(4)


def a_live_view() -> None:
    (fd,), memory = cut_memory(PAGE)
    view = memory.live_view(0, PAGE, writable=True)
    memory.replace([])
    os.ftruncate(fd, 0)
    assert bytes(view) == bytes(PAGE)
    view[5] = 1
    assert view[5] == 1


def each_way_to_handle_chains(packed: str) -> None:
    layout = RingLayout.contiguous(8, 0, packed=packed == "packed")

    def pop_and_read(queue: DeviceQueue) -> None:
        chain = queue.pop()
        assert chain is not None
        chain.read()

    def pop_and_write(queue: DeviceQueue) -> None:
        chain = queue.pop()
        assert chain is not None
        chain.write(b"abc")

    def pop_and_fill(queue: DeviceQueue) -> None:
        chain = queue.pop()
        assert chain is not None
        chain.fill(1)

    def respond(queue: DeviceQueue) -> None:
        queue.pop_many().respond(b"abc")

    def requests(queue: DeviceQueue) -> None:
        queue.pop_many().requests(4)

    def asked(*_args: object) -> None:
        pytest.fail("a handler was asked with zeros")

    def process(queue: DeviceQueue) -> None:
        queue.process(asked)

    def process_batch(queue: DeviceQueue) -> None:
        queue.process_batch(asked, request_size=4, response_size=4)

    for way in (pop_and_read, pop_and_write, pop_and_fill, respond, requests, process, process_batch):
        (_, data), memory = cut_memory(PAGE, PAGE)
        config = QueueConfig.from_layout(layout)
        driver, device = DriverQueue(memory, config), DeviceQueue(memory, config)
        driver.add([(PAGE, 8)], [(PAGE + 64, 8)])
        driver.publish()
        before = memory.read(0, layout.end)
        os.ftruncate(data, 0)
        with pytest.raises(QueueViolation) as caught:
            way(device)
        assert caught.value.rule == "MemoryLost", way.__name__
        assert device.latched == caught.value
        assert (device.pop(), device.has_work(), device.signal()) == (None, False, False)
        assert (driver.has_used(), driver.get_used()) == (False, None)
        used = layout.at("desc.flags" if packed == "packed" else "used.idx")
        assert memory.read(used, 2) == before[used : used + 2], "nothing is published"


def a_handler_with_its_own_response(packed: str) -> None:
    """What is lost while the handler runs is found when its answer is written."""
    layout = RingLayout.contiguous(8, 0, packed=packed == "packed")
    (_, data), memory = cut_memory(PAGE, PAGE)
    config = QueueConfig.from_layout(layout)
    driver, device = DriverQueue(memory, config), DeviceQueue(memory, config)
    driver.add([(PAGE, 8)], [(PAGE + 64, 8)])
    driver.publish()

    def handler(_request: bytes) -> bytes:
        os.ftruncate(data, 0)
        return b"answer"

    with pytest.raises(QueueViolation, match="MemoryLost"):
        device.process(handler)
    assert driver.get_used() is None


def the_rings_themselves(packed: str) -> None:
    layout = RingLayout.contiguous(8, 0, packed=packed == "packed")
    config = QueueConfig.from_layout(layout)
    for end in ("device", "driver"):
        (ring, _), memory = cut_memory(PAGE, PAGE)
        driver, device = DriverQueue(memory, config), DeviceQueue(memory, config)
        driver.add([(PAGE, 8)])
        driver.publish()
        os.ftruncate(ring, 0)
        queue = device if end == "device" else driver
        with pytest.raises(QueueViolation, match="MemoryLost"):
            _ = device.pop() if end == "device" else driver.get_used()
        assert queue.latched is not None
        for make in (DriverQueue, DeviceQueue):
            with pytest.raises(QueueViolation, match="MemoryLost"):
                make(memory, config)
        memory.remove_region(0, PAGE)
        memory.add_region(0, PAGE)
        queue.reset()
        assert queue.latched is None


@pytest.mark.parametrize("case", [each_direct_access, a_live_view])
def test_memory(case: Callable[[], None]) -> None:
    lives(case)


@pytest.mark.parametrize("packed", ["split", "packed"])
@pytest.mark.parametrize("case", [each_way_to_handle_chains, a_handler_with_its_own_response, the_rings_themselves])
def test_queues(case: Callable[[str], None], packed: str) -> None:
    lives(case, packed)


def test_the_rule_is_listed() -> None:
    assert [rule.clause for rule in rules() if rule.name == "MemoryLost"] == ["2.6"]


# ------------------------------------------------------------------------------------------------------ other handlers


def lose_some() -> None:
    (fd,), memory = cut_memory(PAGE)
    os.ftruncate(fd, 0)
    with pytest.raises(RuleViolation):
        memory.read(0, 1)


def faulthandler_first() -> None:
    faulthandler.enable()
    lose_some()
    lose_some()


def faulthandler_first_and_a_fault_elsewhere() -> None:
    faulthandler.enable()
    _, kept = cut_memory(PAGE)
    lose_some()
    bus_error()
    kept.read(0, 1)


def faulthandler_later() -> None:
    """The next file to be guarded puts our handler in front."""
    _, kept = cut_memory(PAGE)
    faulthandler.enable()
    lose_some()
    kept.read(0, 1)


def faulthandler_later_and_a_fault_elsewhere() -> None:
    _, kept = cut_memory(PAGE)
    faulthandler.enable()
    lose_some()
    bus_error()
    kept.read(0, 1)


def a_handler_of_python() -> None:
    seen: list[int] = []
    signal.signal(signal.SIGBUS, lambda number, _: seen.append(number))
    _, kept = cut_memory(PAGE)
    os.kill(os.getpid(), signal.SIGBUS)
    lose_some()
    assert seen == [signal.SIGBUS]
    kept.read(0, 1)


def a_fork() -> None:
    (fd,), memory = cut_memory(PAGE)
    process = os.fork()
    os.ftruncate(fd, 0)
    with pytest.raises(RuleViolation):
        memory.read(0, 1)
    memory.replace([])
    if process == 0:
        os._exit(0)
    assert os.waitpid(process, 0)[1] == 0


@pytest.mark.parametrize("case", [faulthandler_first, faulthandler_later, a_handler_of_python, a_fork])
def test_beside_other_handlers(case: Callable[[], None]) -> None:
    lives(case)


@pytest.mark.parametrize("case", [faulthandler_first_and_a_fault_elsewhere, faulthandler_later_and_a_fault_elsewhere])
def test_a_fault_elsewhere_is_reported_and_ends_the_process(case: Callable[[], None]) -> None:
    code, text = run(case)
    assert code == -signal.SIGBUS
    assert "Bus error" in text
    assert "in bus_error" in text


# ------------------------------------------------------------------------------------------------------------- servers


def _serve(server: ServerThread) -> None:
    """Until our parent is done with us."""
    print("ready", flush=True)
    sys.stdin.read()
    server.close()


def serve_vhost_user(path: str) -> None:
    _serve(vhost_user_world.Server(Path(path)))


def serve_vfio_user(path: str) -> None:
    _serve(vfio_user_world.Server(Path(path)))


@contextmanager
def served(case: Callable[[str], None], path: Path) -> Generator[subprocess.Popen[str]]:
    """A process that serves at `path`, and lives to the end."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(child(case, str(path)), cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        assert process.poll() is None
        _, error = process.communicate("", timeout=PATIENCE)
        assert process.returncode == 0, error
    finally:
        process.kill()
        process.communicate()


def handlers_of(process: subprocess.Popen[str]) -> bool:
    """Whether the process handles SIGBUS."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    caught = re.search(r"SigCgt:\t([0-9a-f]+)", status)
    assert caught is not None
    return bool(int(caught[1], 16) >> (signal.SIGBUS - 1) & 1)


def cut_shared(found: Guest) -> tuple[int, int]:
    """Share two files: rings in the first, buffers in the second; both fds."""
    fds, memory = cut_memory(BUFFERS, BYTES)
    found.front.share(memory)
    found.memory = memory
    found.setup()
    found.front.enable(found.config.index)
    return fds[0], fds[1]


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("what", ["rings", "buffers"])
def test_a_front_end_that_cuts_its_memory_under_a_vhost_user_ring(tmp_path: Path, what: str, *, packed: bool) -> None:
    path = tmp_path / "socket"
    with served(serve_vhost_user, path) as server:
        assert not handlers_of(server)
        with guest(path, packed=packed) as sealed:
            sealed.setup()
            sealed.front.enable(sealed.config.index)
            sealed.request(1)
            assert not handlers_of(server), "sealed files need none"
        for number in range(3):
            with guest(path, packed=packed) as found:
                fds = cut_shared(found)
                found.request(number)
                assert handlers_of(server)
                found.post(number)
                os.ftruncate(fds[what == "buffers"], 0)
                found.kick()
                assert told(found, PATIENCE)
                if what == "buffers":
                    assert found.queue is not None
                    assert found.queue.get_used() is None, "nothing is published"
        with guest(path, packed=packed) as sealed:
            sealed.setup()
            sealed.front.enable(sealed.config.index)
            sealed.request(2)
            assert eventually(lambda: not handlers_of(server)), "none is left behind"


def told(found: Guest, patience: float = 0) -> bool:
    """Whether the server has said that it stopped the ring."""
    assert found.ring is not None
    return bool(select.select([found.ring.error.fileno()], [], [], patience)[0])


def keep_asking(found: Guest) -> None:
    """Until the server says that it has stopped, or our own end, which is over the same files, finds the rings lost."""
    queue = found.queue
    assert queue is not None
    got: list[tuple[int, int]] = []

    def answered() -> bool:
        got.extend(queue.get_used_many())
        return len(got) == 16 or told(found)

    try:
        while not told(found):
            got.clear()
            for number in range(16):
                queue.add([(BUFFERS + (2 + number) * PAGE, 48)], [(BUFFERS + (2 + number) * PAGE + 64, 12)])
            queue.publish()
            found.kick()
            assert eventually(answered)
    except QueueViolation as error:
        assert error.rule == "MemoryLost"  # noqa: PT017 - it is one of two ways to end


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_front_end_that_cuts_its_memory_while_requests_run(tmp_path: Path, *, packed: bool) -> None:
    path = tmp_path / "socket"
    with served(serve_vhost_user, path):
        for number in range(10):
            with guest(path, packed=packed) as found:
                fds = cut_shared(found)
                found.request(number)
                cut = threading.Timer(0.002 * (number + 1), os.ftruncate, (fds[number % 2], PAGE))
                cut.start()
                keep_asking(found)
                cut.join()
                found.kick()
                assert told(found, PATIENCE)
        with guest(path, packed=packed) as found:
            cut_shared(found)
            found.request(1)


def test_memory_that_is_gone_before_its_ring_starts(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with served(serve_vhost_user, path):
        with guest(path) as found:
            fds, memory = cut_memory(BUFFERS, BYTES)
            found.front.share(memory)
            found.memory = memory
            os.ftruncate(fds[0], 0)
            found.ring = found.front.setup_ring(found.config)
            found.front.enable(found.config.index)
            found.kick()
            assert told(found, PATIENCE)
        with guest(path) as found:
            cut_shared(found)
            found.request(1)


def test_a_client_that_cuts_its_memory_under_vfio_user(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with served(serve_vfio_user, path) as server:
        for _ in range(3):
            (fd,), memory = cut_memory(BYTES)
            with VfioUserClient(path, memory=memory) as client:
                driver = vfio_user_world.bring_up(client)
                assert driver.request(1).ret == 102
                assert handlers_of(server)
                os.ftruncate(fd, 0)
                with pytest.raises(PeerError):
                    driver.request(2)
            assert server.poll() is None
        with VfioUserClient(path, memory=vfio_user_world.small_memory()) as client:
            driver = vfio_user_world.bring_up(client)
            assert driver.request(1).ret == 102
            assert eventually(lambda: not handlers_of(server))
