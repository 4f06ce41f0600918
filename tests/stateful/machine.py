"""`Machine`: a device, its driver and the bus between them, with a rule for each thing that can happen.

The device keeps what comes to queue 0 until a rule completes it, and answers on queue 1 at once. What is known of each
request is kept in a model: the bytes that it holds, and how often it was told to be over. After each step:

* no request ends twice, and one that is answered has the right bytes (V5, V7);
* what the driver owns is as it was: readable parts of requests in flight, and memory that is nobody's (V2, V3);
* no queue has more in flight than it holds (V6);
* a broken device writes nothing, tells nothing, and named its reason once (V8, V9);
* in a quiet world, where nothing is masked, held or suspended, nothing waits for a notification that was lost (V11).

At the end everything is reset, and a full request goes through on each queue.
"""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar

from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from virtio_test._core import Chain, GuestMemory
from virtio_test.config import ConfigLayout, ConfigSpace
from virtio_test.devices.base import BaseDevice, kept
from virtio_test.driver.alloc import Arena
from virtio_test.driver.base import Driver
from virtio_test.driver.request import Request
from virtio_test.errors import (
    DeviceNeedsReset,
    PeerError,
    QueueFull,
    QueueViolation,
    StaleChain,
    StateError,
    VirtioTestError,
)
from virtio_test.features import FeatureSet
from virtio_test.status import Status
from virtio_test.transport.pci.function import VirtioPci

from tests.unit.ways import Way, features, reach

LAYOUT = ConfigLayout(("level", "le32"), ("mode", "le32", "rw"))
SIZE = 8
RAM = 1 << 17
FOREIGN, CANARY = 0x5A5A_0000_0000, bytes(range(256)) * 16
SPARE = 0x7000_0000
NAMES = ("INDIRECT_DESC", "EVENT_IDX", "RING_RESET", "SUSPEND")
QUEUE = st.integers(0, 1)


class Worker(BaseDevice):
    """Keeps what comes to queue 0, answers in upper case on queue 1."""

    def __init__(self) -> None:
        super().__init__(
            7,
            handlers={0: kept(lambda _: None), 1: bytes.upper},
            queue_sizes=(SIZE, SIZE),
            config=ConfigSpace(LAYOUT),
            cancel_seconds=2.0,
        )

    def cancel(self, chain: Chain) -> bool:  # noqa: ARG002 - any chain
        return True


class Guest(Driver):
    """Reads the level whenever it is told to."""

    level: object = 0

    def set_up(self) -> None:
        self.level = self.read_field("level")

    def config_changed(self) -> None:
        self.level = self.read_field("level")


@dataclass(eq=False)
class Known:
    """What is known of a request."""

    data: bytes
    answers: tuple[bytes, ...]
    request: Request | None = None
    ends: list[object] = field(default_factory=list[object])


class Pair(RuleBasedStateMachine):
    """A driver with its requests, and a device that a rule makes answer."""

    memory: GuestMemory
    arena: Arena
    device: Worker
    driver: Guest

    def __init__(self) -> None:
        super().__init__()
        self.known: list[Known] = []
        self.number = 0

    @property
    def live(self) -> bool:
        return self.driver.live

    def whole(self) -> bytes:
        return hashlib.sha256(self.memory.read(0, RAM)).digest()

    def turn(self) -> None:
        """Everything that can happen by itself, happens."""
        raise AssertionError("each machine says what that is")

    # --- requests -----------------------------------------------------------------------------------------------

    @rule(queue=QUEUE, cuts=st.integers(1, 3), room=st.integers(0, 2), publish=st.booleans(), again=st.booleans())
    def submit(self, queue: int, cuts: int, room: int, publish: bool, again: bool) -> None:
        self.ask(queue, cuts, room, publish=publish, again=again)

    def ask(self, queue: int, cuts: int, room: int, *, publish: bool = True, again: bool = False) -> None:
        """One request; with `again` its end asks for another one."""
        self.number += 1
        parts = [f"{self.number}:{part};".encode() + b"x" * part for part in range(cuts)]
        data = b"".join(parts)
        sizes = [len(data), 7][:room] if room else []
        # Where there is no room the answer is rejected, and 0 bytes come back.
        whole = data.upper() if queue == 1 else data[::-1]
        known = Known(data, (whole if room else b"",))

        def over(request: Request) -> None:
            known.ends.append(request.error)
            if again and request.error is None and self.driver.live:
                self.ask(queue, 1, 1)

        before = self.whole()
        try:
            known.request = self.driver.submit(queue, parts, sizes, publish=publish, on_done=over)
        except QueueFull:
            return
        except (StateError, PeerError):
            assert not self.driver.live
            assert self.whole() == before, "a call that was refused has changed memory"
            return
        self.known.append(known)
        if not publish:
            self.driver.flush(queue)

    @rule()
    def run(self) -> None:
        self.turn()

    @rule(which=st.integers(0, SIZE), thread=st.booleans(), short=st.booleans())
    def complete(self, which: int, thread: bool, short: bool) -> None:
        """Later, in the loop's thread or in another one, all of it or without an answer."""
        overtaken, chains = self.device.kept[:which], self.device.kept[which:]
        known = {each.data: each for each in self.known}
        for chain in overtaken if chains else ():
            # It cannot go back into its ring any more: a queue that stops answers it with nothing (`BaseDevice`).
            with suppress(StaleChain):
                known[chain.read()].answers += (b"",)

        def finish() -> None:
            for chain in chains:
                try:
                    data = chain.read()
                except StaleChain:
                    # Its queue was reset, or broke, under whoever kept it.
                    continue
                answer = data[::-1]
                if short or len(answer) > chain.writable:
                    answer = b""
                    known[data].answers += (b"",)
                self.device.complete(chain, answer)

        if not thread:
            finish()
        else:
            other = threading.Thread(target=finish)
            other.start()
            other.join()

    # --- what holds ---------------------------------------------------------------------------------------------

    @invariant()
    def nothing_ends_twice(self) -> None:
        for known in self.known:
            assert len(known.ends) <= 1, f"{known} ended more than once"
            request = known.request
            if request is None or not known.ends:
                continue
            assert request.done
            if request.error is None:
                assert request.response in known.answers, (request.response, known)
            else:
                assert isinstance(request.error, VirtioTestError)

    @invariant()
    def what_is_in_flight_stays(self) -> None:
        for known in self.known:
            if known.request is not None and not known.ends:
                parts = [self.memory.read(*each) for each in known.request.readable]
                assert b"".join(parts) == known.data
        assert self.memory.read(FOREIGN, len(CANARY)) == CANARY

    def both_queues_answer(self) -> None:
        """A full request on each queue, and then nothing is left of anything."""
        for queue in range(2):
            self.ask(queue, 2, 2)
        self.turn()
        self.complete(0, thread=False, short=False)
        self.turn()
        assert self.driver.in_flight == []
        self.nothing_ends_twice()
        self.driver.detach()
        assert self.arena.used == 0, "memory of the driver was not freed"


class Machine(Pair):
    """One transport, one ring format."""

    way: ClassVar[str] = "in process"
    ring: ClassVar[str] = "split"

    def __init__(self) -> None:
        super().__init__()
        self.memory = GuestMemory([(0, RAM), (FOREIGN, len(CANARY))], backing="anonymous")
        self.memory.write(FOREIGN, CANARY)
        self.device = Worker()
        self.over: Way = reach(self.device, self.way, more=FeatureSet("SUSPEND"), memory=self.memory)
        self.held = False
        self.masked: set[int] = set()
        self.master = True
        self.spare = 0
        self.arena = Arena(self.memory, address=0x1000, size=RAM - 0x1000)
        self.driver = Guest(self.over.registers, layout=LAYOUT, arena=self.arena, timeout=0.5)

    # --- what there is ------------------------------------------------------------------------------------------

    @property
    def quiet(self) -> bool:
        """Nothing stands between the two."""
        return not self.held and not self.masked and self.master

    @property
    def status(self) -> int:
        return self.over.registers.read_status()

    def turn(self) -> None:
        """Everything that can happen at once, happens."""
        broken = bool(self.over.bank.status.broken)
        before = self.whole() if broken else b""
        self.over.run()
        if broken:
            assert self.whole() == before, "a broken device has written"
        if self.driver.live and self.quiet:
            waiting = [each for each in self.driver.in_flight if each.queue_index == 1]
            assert not waiting, f"nobody tells of {waiting}"
            later = [each for each in self.driver.in_flight if each.queue_index == 0]
            assert len(later) == len(self.device.kept), f"{later} in flight, {self.device.kept} kept"
            assert self.driver.level == self.device.config.level, "a change was not told"

    # --- bring-up and down --------------------------------------------------------------------------------------

    @initialize()
    def begin(self) -> None:
        self.bring_up(0, wanted=frozenset(NAMES))

    @rule(indirect=QUEUE, wanted=st.frozensets(st.sampled_from(NAMES)))
    def bring_up(self, indirect: int, wanted: frozenset[str]) -> None:
        """From any state: what was in flight is lost, and told so once."""
        self.driver.wanted = features(self.ring) - FeatureSet(*NAMES) | FeatureSet(*wanted)
        self.driver.indirect = bool(indirect)
        self.driver.initialize()
        assert self.driver.live
        assert self.driver.in_flight == []
        assert self.device.kept == []

    @rule()
    def reset(self) -> None:
        self.driver.reset()
        assert self.status == 0
        assert all(each.ends for each in self.known)

    @precondition(lambda self: self.live and "RING_RESET" in self.driver.features)
    @rule(queue=QUEUE)
    def reset_queue(self, queue: int) -> None:
        flying = [each for each in self.driver.in_flight if each.queue_index == queue]
        assert self.driver.reset_queue(queue) == flying
        assert all(isinstance(each.error, StateError) for each in flying)

    # --- suspended, saved, moved --------------------------------------------------------------------------------

    @precondition(lambda self: self.live and "SUSPEND" in self.driver.features)
    @rule()
    def suspend(self) -> None:
        broken = self.over.bank.status.broken
        try:
            self.driver.suspend()
        except DeviceNeedsReset:
            assert broken
            return
        assert self.status & Status.SUSPEND
        assert self.device.kept == []
        before = self.whole()
        self.over.run()
        assert self.whole() == before

    @precondition(lambda self: self.driver.suspended)
    @rule()
    def resume(self) -> None:
        broken = self.over.bank.status.broken
        try:
            self.driver.resume()
        except DeviceNeedsReset:
            assert broken
        else:
            assert self.driver.live

    @rule(other=st.booleans(), wiped=st.booleans())
    def save_and_restore(self, other: bool, wiped: bool) -> None:
        side = self.over.side
        before = self.whole()
        try:
            saved = side.save()
        except StateError:
            # A device that is held writes nothing, and a state with requests in flight is none.
            assert self.whole() == before
            assert any(slot.queue is not None and slot.queue.in_flight for slot in self.over.bank.slots)
            return
        state: dict[str, Any] = json.loads(json.dumps(saved))
        status = self.status
        if wiped:
            if isinstance(side, VirtioPci):
                side.reset()
            else:
                side.bank.reset()
        if other:
            self.device = Worker()
        side.restore(state, device=self.device)
        assert self.status == status
        assert json.loads(json.dumps(side.save()))["version"] == state["version"]

    @rule(held=st.booleans(), size=st.integers(1, 4))
    def another_memory_table(self, held: bool, size: int) -> None:
        """A region comes, or goes: every address is looked up anew."""
        if held and not self.held:
            self.over.bank.hold()
        if any(each.address == SPARE for each in self.memory.regions):
            self.memory.remove_region(SPARE, self.spare)
        else:
            self.spare = size << 12
            self.memory.add_region(SPARE, self.spare)
        if held and not self.held:
            self.over.bank.release()

    @rule()
    def hold_or_release(self) -> None:
        """The carrier needs memory to stand still."""
        self.held = not self.held
        target = self.over.side if isinstance(self.over.side, VirtioPci) else self.over.bank
        (target.hold if self.held else target.release)()

    # --- configuration ------------------------------------------------------------------------------------------

    @rule(level=st.integers(0, 1 << 32 - 1))
    def change(self, level: int) -> None:
        self.device.config.update(level=level & 0xFFFF_FFFF)

    @rule(mode=st.integers(0, 3))
    def configure(self, mode: int) -> None:
        before = self.device.config.mode
        try:
            self.driver.write_field("mode", mode)
        except StateError:
            assert self.driver.suspended
            assert self.device.config.mode == before
        else:
            assert self.device.config.mode == mode

    # --- broken -------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.live and self.quiet)
    @rule(queue=QUEUE, length=st.integers(1, 64))
    def break_ring(self, queue: int, length: int) -> None:
        """The driver names memory that is not there: the device breaks, says why once, and everything ends."""
        self.turn()
        if not self.driver.live:
            return
        ring = self.driver.queues[queue]
        try:
            ring.add([(0xFFFF_0000_0000, length)])
        except QueueFull:
            return
        said = len([each for each in self.over.bank.errors if isinstance(each, QueueViolation)])
        ring.signal()
        self.over.bank.kick(queue)
        self.turn()
        assert self.status & Status.DEVICE_NEEDS_RESET
        broken = [each for each in self.over.bank.errors if isinstance(each, QueueViolation)][said:]
        assert [each.rule for each in broken] == ["UnmappedAddress"]
        assert self.driver.broken is not None, "nobody told the driver"
        assert self.driver.in_flight == []

    @precondition(lambda self: self.live and self.quiet)
    @rule(queue=QUEUE)
    def break_used(self, queue: int) -> None:
        """The device's side of the ring is overwritten: the driver breaks, and everything ends."""
        self.turn()
        if not self.driver.live:
            return
        ring = self.driver.queues[queue]
        layout = ring.layout()
        if layout.packed:
            flags = ring.state.used
            at, wrap = flags & 0x7FFF, flags >> 15
            self.memory.write(layout.at("desc.id", at), (0xFFF0).to_bytes(2, "little"))
            self.memory.write(layout.at("desc.flags", at), (0x8080 * wrap).to_bytes(2, "little"))
            if not ring.has_used():
                return
        else:
            idx = (ring.state.used + SIZE + 3) & 0xFFFF
            self.memory.write(layout.at("used.idx"), idx.to_bytes(2, "little"))
        self.over.bank.call(queue)
        self.over.run()
        assert isinstance(self.driver.broken, QueueViolation)
        assert self.driver.in_flight == []

    @rule()
    def give_up(self) -> None:
        """The device breaks by itself."""
        self.over.bank.broken(QueueViolation("DeviceBroken", "2.1.2", "by hand", queue=0))

    # --- what holds ---------------------------------------------------------------------------------------------

    @invariant()
    def bounded(self) -> None:
        for slot in self.over.bank.slots:
            if slot.queue is not None:
                assert slot.queue.in_flight <= slot.size
        assert len(self.driver.in_flight) <= 2 * SIZE

    def unblock(self) -> None:
        """Nothing stands in the way any more."""
        if self.held:
            self.hold_or_release()

    def teardown(self) -> None:
        note(f"status {self.status:#x}, errors {self.over.bank.errors[-3:]}")
        self.unblock()
        self.bring_up(0, wanted=frozenset(NAMES))
        self.both_queues_answer()
        self.known.clear()
