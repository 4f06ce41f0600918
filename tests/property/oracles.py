"""What must hold of every case, whatever came of it: R4, V2, V8, V9 for what is broken, V5, V7 for what is accepted."""

from __future__ import annotations

import pytest
from virtio_test._core import DeviceQueue, DriverQueue, rules
from virtio_test.errors import QueueViolation, StateError
from virtio_test.strategies import Push, Scene
from virtio_test.strategies.case import AVAIL, INDEX, PAGE, RING, TABLES, USED

CLAUSES = {rule.name: rule.clause.split(", ") for rule in rules()}
WRITE = 2


def image(scene: Scene) -> list[bytes]:
    """All of guest memory that is worth reading."""
    return [scene.memory.read(each.address, each.size) for each in scene.memory.regions if each.size <= 1 << 20]


def judge(scene: Scene) -> None:
    """The scene has run; what is broken is silent and heals, what is accepted is completed."""
    if not scene.built:
        refused(scene)
    elif scene.violation is None:
        complete(scene)
    else:
        named(scene.violation)
        silent(scene)
        heal(scene)


def named(violation: QueueViolation) -> None:
    """The error says what, where and by which clause."""
    assert violation.clause in CLAUSES[violation.rule]
    assert violation.queue == INDEX


def refused(scene: Scene) -> None:
    """Nothing of guest memory is touched; a queue that works keeps working when its reset is refused."""
    case = scene.case
    before = image(scene)
    config, state = case.config(scene.policy), case.begin()
    with pytest.raises(QueueViolation) as caught:
        (DriverQueue if case.end == "driver" else DeviceQueue)(scene.memory, config, state=state)
    assert scene.violation is not None
    assert caught.value.rule == scene.violation.rule
    assert image(scene) == before
    if case.end == "driver":
        return
    queue = DeviceQueue(scene.memory, case.config(judged=False), state=case.begin(judged=False))
    with pytest.raises(QueueViolation) as caught:
        queue.reset(config, state=state)
    assert caught.value.rule == scene.violation.rule
    assert image(scene) == before
    while (chain := queue.pop()) is not None:
        assert queue.push(chain, 0)
    assert len(scene.returned()) == len(case.buffers)


def silent(scene: Scene) -> None:
    """Said once; then nothing is handed out, nothing is read, nothing is written."""
    trace = scene.memory.trace
    assert trace is not None
    before = image(scene)
    trace.clear()
    if scene.case.end == "driver":
        queue = scene.driver
        assert queue.latched == scene.violation
        assert queue.get_used() is None
        assert queue.get_used_many() == []
        assert not queue.has_used()
        assert not queue.signal()
        with pytest.raises(StateError):
            queue.add([], [(0, 1)])
    else:
        queue = device(scene)
        assert queue.latched == scene.violation
        assert queue.pop() is None
        assert queue.has_work() is False
        assert len(queue.pop_many()) == 0
        assert queue.process(lambda _: b"") == 0
        assert queue.signal() is False
        for chain in scene.chains:
            assert queue.push(chain, 0) is False
    assert trace.log() == []
    assert image(scene) == before


def device(scene: Scene) -> DeviceQueue:
    assert isinstance(scene.device, DeviceQueue)
    return scene.device


def heal(scene: Scene) -> None:
    """A reset works whatever happened before; a driver end first gives back every buffer, each once, oldest first."""
    case, memory = scene.case, scene.memory
    if not memory.is_mapped(case.ring, PAGE):
        return
    layout = case.layout()
    if case.end == "driver":
        back = {number for number, _ in scene.used}
        waiting = scene.driver.detach()
        assert waiting == sorted(waiting)
        assert {scene.number(token) for token in waiting} == set(range(scene.added)) - back
        assert scene.driver.detach() == []
        scene.driver.reset()
        peer = DeviceQueue(memory, case.config(judged=False))
        token = scene.driver.add([], [(TABLES, 16)])
        scene.driver.publish()
        chain = peer.pop()
        assert chain is not None
        assert peer.push(chain, 5)
        assert scene.driver.get_used() == (token, 5)
        return
    memory.fill(layout.desc, layout.end - layout.desc)
    queue = device(scene)
    queue.reset()
    driver = DriverQueue(memory, case.config(judged=False))
    token = driver.add([], [(TABLES, 16)])
    driver.publish()
    chain = queue.pop()
    assert chain is not None
    assert chain.write(b"again") == 5
    assert queue.push(chain)
    assert driver.get_used_many() == [(token, 5)]


def complete(scene: Scene) -> None:
    """Everything that was handed out goes back, with what was written, and the ring shows it (V5, V7, P19)."""
    if scene.case.end == "driver":
        assert scene.driver.latched is None
        return
    queue = device(scene)
    assert queue.latched is None
    # A device that writes over the ring changes what it says itself; the bytes are for what lies elsewhere.
    pushed = {act.which for act in scene.case.later if isinstance(act, Push)}
    for chain in (each for number, each in enumerate(scene.chains) if number not in pushed):
        ring = any(RING <= address < TABLES for address, _, _ in chain.segments)
        before = queue.state.used
        wanted = 0 if ring else min(chain.writable, 64)
        written = 0 if ring else chain.write(b"\xa5" * wanted)
        assert written == wanted
        assert queue.push(chain, written)
        assert used(scene, before) == (chain.head, written)
    assert queue.in_flight == 0


def used(scene: Scene, state: int) -> tuple[int, int]:
    """(id, length) of the used entry written at `state`."""
    size = scene.case.size
    if not scene.case.packed:
        assert scene.get("used.idx") == state + 1 & 0xFFFF
        slot = state % size
        return scene.get("used.ring.id", slot), scene.get("used.ring.len", slot)
    slot, wrap = state & 0x7FFF, state >> 15
    flags, length = scene.get("desc.flags", slot), scene.get("desc.len", slot)
    assert flags == (AVAIL | USED) * wrap | WRITE * (length > 0), f"used flags {flags:#x} (P19)"
    return scene.get("desc.id", slot), length
