"""A device's own threads that complete requests into memory which the client withholds: nobody waits for each other."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import Empty, Queue

import pytest
from virtio_test._core import Chain, GuestMemory
from virtio_test.carrier.vfio_user.client import VfioUserClient
from virtio_test.devices.base import BaseDevice, kept
from virtio_test.driver.base import Driver
from virtio_test.driver.pci import open_pci
from virtio_test.loop import OwnerLoop
from virtio_test.transport.pci.function import VirtioPci

from .vfio_user_world import PAGE, Server, a_file, serving, small_memory

PATIENCE = 1.0
ROOM = 1000


class Threaded:
    """A device that answers in a thread, and the server of it."""

    def __init__(self) -> None:
        self.chains: Queue[Chain] = Queue()
        self.failures: list[BaseException] = []
        self.completed = 0
        self._stopping = threading.Event()
        self.device = BaseDevice(45, handlers={0: kept(self.chains.put)}, queue_sizes=(64,))
        self.endpoint = VirtioPci(self.device, flavour="non-transitional", loop=OwnerLoop(), memory=GuestMemory())
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                try:
                    chain = self.chains.get(timeout=0.01)
                except Empty:
                    continue
                self.completed += self.device.complete(chain, b"x" * ROOM)
        except BaseException as error:  # noqa: BLE001 - looked at where the test ends
            self.failures.append(error)

    def close(self) -> None:
        self._stopping.set()
        self._thread.join()
        assert self.failures == []


@pytest.fixture
def threaded() -> Iterator[Threaded]:
    made = Threaded()
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def server(tmp_path: Path, threaded: Threaded) -> Iterator[Server]:
    with serving(tmp_path / "s", threaded.endpoint, patience=PATIENCE) as made:
        yield made


def withholding(server: Server) -> tuple[VfioUserClient, Driver]:
    client = VfioUserClient(server.path, memory=small_memory(), share=False)
    driver = Driver(open_pci(client))
    driver.initialize()
    return client, driver


def test_the_loop_may_wait_for_a_thread_that_waits_for_a_reply(server: Server) -> None:
    client, driver = withholding(server)
    with client:
        begin = time.monotonic()
        for _ in range(15):
            # The first is completed while the others are taken: loop and thread want the queue.
            requests = [driver.submit(0, [b"abc"], [ROOM]) for _ in range(8)]
            assert {request.wait() for request in requests} == {b"x" * ROOM}
        assert time.monotonic() - begin < 15 * PATIENCE
    assert server.idle()
    assert server.last_error is None


def test_memory_may_be_taken_away_while_a_thread_writes(server: Server, threaded: Threaded) -> None:
    client, driver = withholding(server)
    fd = a_file()
    with client:
        for number in range(20):
            request = driver.submit(0, [b"abc"], [ROOM])
            # Elsewhere, but the table is one: it is exchanged when nobody uses it.
            at = (1 << 32) + number * PAGE
            begin = time.monotonic()
            client.export(at, PAGE, fd=fd)
            client.withdraw(at, PAGE)
            assert time.monotonic() - begin < PATIENCE
            assert request.wait() == b"x" * ROOM
    os.close(fd)
    assert threaded.completed == 20
    assert server.idle()
    assert server.last_error is None


def test_a_client_may_go_while_a_thread_writes_to_its_memory(server: Server, threaded: Threaded) -> None:
    for _ in range(10):
        client, driver = withholding(server)
        with client:
            for _ in range(8):
                driver.submit(0, [b"abc"], [ROOM])
        begin = time.monotonic()
        assert server.idle()
        assert time.monotonic() - begin < PATIENCE
    assert server.last_error is None
