"""SIGKILL: of our back-end at every message and at any instruction, of our front-end at every message.

A request that a dead back-end has executed and not published may be executed again: at least once. Its answer comes
once.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Generator
from pathlib import Path

import pytest
from virtio_test.device import RING_FEATURES
from virtio_test.devices.base import BaseDevice
from virtio_test.driver.base import Driver
from virtio_test.driver.request import Request
from virtio_test.errors import PeerDisconnected, PeerError
from virtio_test.features import FeatureSet
from virtio_test.spec.testdevice import REQUEST, RESPONSE
from virtio_test.transport.vhost_user.registers import VhostUserRegisters

from .vhost_user_victims import SIZE, Morgue, answer, kill, morgue
from .vhost_user_world import guest, serving
from .world import eventually, mapped_files, open_fds

WAYS = {
    "split": (False, False, False),
    "packed": (True, False, False),
    "split, in order": (False, True, False),
    "packed, in order": (True, True, False),
    "split, later": (False, False, True),
    "packed, later": (True, False, True),
}
BUSY = 6


@pytest.fixture(scope="module")
def victims() -> Generator[Morgue]:
    with morgue() as made:
        yield made


class Survivor:
    """A driver that outlives its back-ends, and what became of its requests."""

    def __init__(self, victims: Morgue, folder: Path, way: str) -> None:
        self.packed, self.ordered, self.later = WAYS[way]
        self.victims = victims
        self.path, self.journal = folder / "s", folder / "journal"
        self.journal.touch()
        self.dice = random.Random(way)
        self.serials: dict[Request, int] = {}
        self.answered: Counter[int] = Counter()
        # What had its answer when a back-end began, by its process id.
        self.before: dict[int, set[int]] = {}
        self.lost: list[PeerError] = []
        self.kills = 0
        self.next = 0
        self.pid = self.start()
        self.registers = VhostUserRegisters(
            self.path, device_id=45, queue_size=SIZE, keep_in_flight=True, on_lost=self.lost.append, timeout=10.0
        )
        wanted = RING_FEATURES if self.ordered else RING_FEATURES - FeatureSet("IN_ORDER")
        self.driver = Driver(self.registers, wanted=wanted, indirect=True, timeout=10.0)
        self.driver.initialize()
        assert ("IN_ORDER" in self.driver.features) == (self.ordered and not self.later)

    def start(self, *, at: int = 0, after: bool = False, clock: float = 0.0, working: bool = False) -> int:
        """The next back-end."""
        ready = Path(f"{self.path}.ready")
        ready.unlink(missing_ok=True)
        # The last one may be dying still, with its socket open.
        self.path.unlink(missing_ok=True)
        self.pid = self.victims.make(
            "back-end", path=str(self.path), journal=str(self.journal), later=self.later, packed=self.packed,
            seed=self.dice.randrange(1 << 30), at=at, after=after, clock=clock, working=working,
        )  # fmt: skip
        self.before[self.pid] = set(self.answered)
        assert eventually(ready.exists)
        return self.pid

    def submit(self) -> None:
        """So many requests are in flight, of one or two buffers to be read, direct or not."""
        while self.next - sum(self.answered.values()) < BUSY:
            serial = self.next
            self.next += 1
            data = REQUEST.pack(serial, 0, 0, 0, b"")
            parts = [data] if serial % 3 else [data[:20], data[20:]]
            request = self.driver.submit(0, parts, [RESPONSE.size], indirect=serial % 2 == 0, on_done=self._done)
            self.serials[request] = serial

    def _done(self, request: Request) -> None:
        serial = self.serials[request]
        assert request.error is None
        assert request.data == answer(REQUEST.pack(serial, 0, 0, 0, b""))
        self.answered[serial] += 1

    def reconnect(self) -> bool:
        """Whether the back-end lived to take over."""
        try:
            taken = self.registers.reconnect()
        except PeerDisconnected:
            self.kills += 1
            return False
        assert taken
        return True

    def work_until_death(self) -> None:
        deaths = len(self.lost)
        while len(self.lost) == deaths:
            self.submit()
            answered = sum(self.answered.values())
            assert self.driver.loop.run(
                until=lambda answered=answered: len(self.lost) > deaths or sum(self.answered.values()) > answered,
                timeout=10.0,
            )
        self.kills += 1

    def finish(self) -> None:
        """With a last one that lives: all are answered, each once, and each was executed."""
        self.start()
        assert self.reconnect()
        self.submit()
        assert self.driver.loop.run(until=lambda: len(self.answered) == self.next, timeout=10.0)
        assert set(self.answered.values()) == {1}
        executed = [tuple(map(int, line.split())) for line in self.journal.read_text().splitlines()]
        assert {serial for _, serial in executed} == set(range(self.next))
        again = [(pid, serial) for pid, serial in executed if serial in self.before[pid]]
        assert again == [], "executed after its answer was there"
        assert all(isinstance(error, PeerDisconnected) for error in self.registers.errors)
        self.driver.detach()
        self.registers.close()
        kill(self.pid)


def killed_at_any_time(victims: Morgue, folder: Path, way: str, kills: int) -> None:
    survivor = Survivor(victims, folder, way)
    survivor.submit()
    kill(survivor.pid)
    assert survivor.driver.loop.run(until=lambda: bool(survivor.lost), timeout=10.0)
    survivor.kills = 1
    while survivor.kills < kills:
        working = survivor.dice.random() < 0.7
        survivor.start(clock=survivor.dice.uniform(0.0002, 0.01 if working else 0.02), working=working)
        if survivor.reconnect():
            survivor.work_until_death()
    survivor.finish()


@pytest.mark.row("M20", "R11")
@pytest.mark.parametrize("way", WAYS)
def test_killed_at_any_time_each_request_is_answered_once(victims: Morgue, tmp_path: Path, way: str) -> None:
    killed_at_any_time(victims, tmp_path, way, 10)


@pytest.mark.deep
@pytest.mark.timeout(900)
@pytest.mark.row("M20", "R11")
@pytest.mark.parametrize("way", WAYS)
def test_killed_a_thousand_times(victims: Morgue, tmp_path: Path, way: str) -> None:
    killed_at_any_time(victims, tmp_path, way, 170)


@pytest.mark.row("M20")
@pytest.mark.parametrize("way", ["split, later", "packed, later"])
def test_killed_at_every_message_each_request_is_answered_once(victims: Morgue, tmp_path: Path, way: str) -> None:
    survivor = Survivor(victims, tmp_path, way)
    survivor.submit()
    kill(survivor.pid)
    assert survivor.driver.loop.run(until=lambda: bool(survivor.lost), timeout=10.0)
    at, lived = 0, False
    while not lived:
        at += 1
        survivor.start(at=at, after=at % 2 == 0)
        lived = survivor.reconnect()
    # Features, memory, region, ring and status are many messages.
    assert at > 15
    survivor.submit()
    kill(survivor.pid)
    survivor.work_until_death()
    survivor.finish()


@pytest.mark.row("M20")
@pytest.mark.parametrize("packed", [False, True])
def test_a_front_end_that_is_killed_at_any_message_leaves_nothing(
    victims: Morgue, tmp_path: Path, packed: bool
) -> None:
    with serving(tmp_path / "s", BaseDevice(45, handlers={0: answer}, queue_sizes=(SIZE,))) as server:
        before = open_fds(), mapped_files()
        for at in range(1, 40):
            victims.make("front-end", path=str(server.path), packed=packed, at=at)
            assert eventually(lambda at=at: server.backend.sessions == at)
            assert eventually(lambda: server.backend.session is None)
        assert eventually(lambda: (open_fds(), mapped_files()) == before)
    with serving(tmp_path / "again") as server, guest(server.path, packed=packed) as g:
        g.setup()
        g.front.enable(0)
        g.request(1)
