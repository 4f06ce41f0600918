"""The machine over vhost-user, both ends in this process: our back-end in its own thread, our front-end before it.

Besides what the driver does, connections end and begin anew, memory tables change while rings run, and a ring breaks,
which here is told by an err fd. After each case nothing is left of the connection: no fd, no mapping (V12).
"""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule, run_state_machine_as_test
from virtio_test._core import GuestMemory
from virtio_test.driver.alloc import Arena
from virtio_test.errors import PeerError, QueueFull, StateError
from virtio_test.features import FeatureSet
from virtio_test.transport.vhost_user.backend import Backend
from virtio_test.transport.vhost_user.registers import VhostUserRegisters

from tests.stateful.machine import CANARY, FOREIGN, LAYOUT, QUEUE, RAM, SIZE, Guest, Pair, Worker
from tests.unit.ways import features
from tests.unit.world import PATIENCE, ServerThread, eventually, mapped_files, open_fds

NAMES = ("INDIRECT_DESC", "EVENT_IDX", "RING_RESET")
SPARE = 0x7000_0000
STEPS = 20


class Server(ServerThread):
    """The one back-end that all cases of a test connect to, one after the other."""

    def __init__(self, path: Path) -> None:
        self.device = Worker()
        self.backend = Backend(self.device, path=path)
        super().__init__(path, self.backend)

    def idle(self) -> bool:
        return eventually(lambda: self.backend.session is None)


class VhostUserMachine(Pair):
    """One connection after the other, one ring format."""

    server: ClassVar[Server]
    ring: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.device = self.server.device
        self.memory = GuestMemory([(0, RAM), (FOREIGN, len(CANARY))])
        self.memory.write(FOREIGN, CANARY)
        self.arena = Arena(self.memory, address=0x1000, size=RAM - 0x1000)
        self.registers = self.connect()
        self.driver = Guest(self.registers, layout=LAYOUT, arena=self.arena, timeout=PATIENCE)

    def connect(self) -> VhostUserRegisters:
        assert self.server.idle()
        return VhostUserRegisters(
            self.server.path,
            device_id=7,
            memory=self.memory,
            queues=2,
            queue_size=SIZE,
            config_size=LAYOUT.size,
            timeout=PATIENCE,
        )

    def in_the_loop(self, call: Any) -> None:
        """Do it where the device lives, and wait until it is done."""
        done: list[object] = []
        self.server.loop.call_soon(lambda: done.append(call()))
        assert eventually(lambda: bool(done))

    def turn(self) -> None:
        """Until nothing waits: all of queue 1 is answered, all of queue 0 kept, every change told."""

        def settled() -> bool:
            self.registers.loop.run_pending()
            flying = [each.queue_index for each in self.driver.in_flight]
            told = self.driver.level == self.device.config.level
            return not self.driver.live or (1 not in flying and len(flying) == len(self.device.kept) and told)

        assert eventually(settled), (self.driver.in_flight, self.device.kept, self.driver.level, self.device.config)

    @initialize()
    def begin(self) -> None:
        self.bring_up(0, wanted=frozenset(NAMES))

    @rule(indirect=QUEUE, wanted=st.frozensets(st.sampled_from(NAMES)))
    def bring_up(self, indirect: int, wanted: frozenset[str]) -> None:
        if self.registers.lost is not None:
            self.again()
        self.driver.wanted = features(self.ring) - FeatureSet(*NAMES) | FeatureSet(*wanted)
        self.driver.indirect = bool(indirect)
        self.driver.initialize()
        assert self.driver.in_flight == []
        assert eventually(lambda: self.device.kept == [])

    @rule()
    def reset(self) -> None:
        self.driver.reset()
        assert self.driver.in_flight == []
        assert all(each.ends for each in self.known)

    @precondition(lambda self: self.live and "RING_RESET" in self.driver.features)
    @rule(queue=QUEUE)
    def reset_queue(self, queue: int) -> None:
        flying = [each for each in self.driver.in_flight if each.queue_index == queue]
        try:
            lost = self.driver.reset_queue(queue)
        except PeerError:
            assert self.registers.lost is not None
            return
        # One that came back meanwhile is not lost.
        assert set(map(id, lost)) <= set(map(id, flying))
        assert all(isinstance(each.error, StateError) for each in lost)

    @precondition(lambda self: self.live)
    @rule(level=st.integers(0, 5))
    def change(self, level: int) -> None:
        self.in_the_loop(lambda: self.device.config.update(level=level))

    @precondition(lambda self: self.live)
    @rule(mode=st.integers(0, 3))
    def configure(self, mode: int) -> None:
        self.driver.write_field("mode", mode)
        assert self.driver.read_field("mode") == mode

    @precondition(lambda self: self.registers.lost is None)
    @rule(size=st.integers(1, 4))
    def another_memory_table(self, size: int) -> None:
        """While rings run: running copies end, every address is looked up anew."""
        spare = [each.size for each in self.memory.regions if each.address == SPARE]
        if spare:
            self.memory.remove_region(SPARE, spare[0])
        else:
            self.memory.add_region(SPARE, size << 12)
        self.registers.share_memory()

    @precondition(lambda self: self.live)
    @rule(queue=QUEUE, length=st.integers(1, 64))
    def break_ring(self, queue: int, length: int) -> None:
        self.turn()
        ring = self.driver.queues[queue]
        try:
            ring.add([(0xFFFF_0000_0000, length)])
        except QueueFull:
            return
        ring.signal()
        # Asked for or not: the device need not want to be kicked.
        self.registers.kick_notifier(queue, lambda: 0).notify()
        assert eventually(lambda: (self.registers.loop.run_pending(), self.driver.broken is not None)[1])
        assert self.driver.in_flight == []

    @precondition(lambda self: self.registers.lost is None)
    @rule()
    def cut(self) -> None:
        """The connection ends under both of them."""
        self.registers.front.close()
        with pytest.raises(PeerError):
            self.registers.front.request(1)  # type: ignore[arg-type]
        self.again()

    def again(self) -> None:
        """Another connection; what was in flight in the old one is lost, and told so once."""
        self.registers.close()
        self.driver.reset()
        assert self.driver.in_flight == []
        self.registers = self.connect()
        self.driver = Guest(self.registers, layout=LAYOUT, arena=self.arena, timeout=PATIENCE)

    def teardown(self) -> None:
        self.bring_up(0, wanted=frozenset(NAMES))
        self.both_queues_answer()
        self.registers.close()
        self.known.clear()
        assert self.server.idle()


@pytest.fixture
def quiet() -> Generator[None]:
    """Nothing is logged: pytest keeps what is, and with an error's traceback the queue that it was about."""
    logger = logging.getLogger("virtio_test")
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(logging.NOTSET)


@pytest.mark.parametrize("ring", ["split", "packed"])
@pytest.mark.usefixtures("quiet")
def test_whatever_happens(tmp_path: Path, ring: str) -> None:
    with closing(Server(tmp_path / "s")) as server:
        made: Any = type(f"VhostUserMachine_{ring}", (VhostUserMachine,), {"server": server, "ring": ring})
        cases = max(10, (settings.default or settings()).max_examples // 10)
        before = (open_fds(), mapped_files())
        how = settings(max_examples=cases, stateful_step_count=STEPS, deadline=None)
        run_state_machine_as_test(made, settings=how)
        assert eventually(lambda: (open_fds(), mapped_files()) == before)
