"""Cases of any kind: legal traffic against the model, chaos against the invariants, one request list in every form."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from virtio_test._core import Chain, DeviceQueue, GuestMemory, QueueConfig, QueueState
from virtio_test.errors import QueueViolation
from virtio_test.strategies import (
    Add,
    Pop,
    Publish,
    Push,
    Race,
    RandomDraw,
    RingCase,
    Scene,
    Take,
    Use,
    Write,
    chains,
    chaos,
    legal,
    random_case,
)
from virtio_test.strategies.case import Name, Outcome
from virtio_test.strategies.noise import chaos_case
from virtio_test.strategies.traffic import EVENT_IDX, IN_ORDER, INDIRECT_DESC, legal_case

from tests.property import oracles
from tests.property.ends import ModelDeviceEnd, ModelDriverEnd, Setup, features_of
from tests.property.model import FlatMemory, Plan, Segment
from tests.property.watch import Watch

POLICIES = st.sampled_from(("interop", "strict"))
ENDS = ("device", "driver")

# ------------------------------------------------------------------------------------------------------- legal traffic


def model(case: RingCase) -> tuple[list[tuple[tuple[int, int, bool], ...]], list[tuple[int, int]]]:
    """The case played by both ends of the reference model: chains that its device saw, buffers that its driver got."""
    memory = FlatMemory([(address, size) for address, size, _ in case.regions])
    setup = Setup(case.packed, case.size, case.ring, case.start, features_of(case.features, packed=case.packed))
    setup.ring(memory).begin_at(case.start)
    driver, device = ModelDriverEnd(setup, memory), ModelDeviceEnd(setup, memory)
    tokens, seen, used = list[int](), list[tuple[tuple[int, int, bool], ...]](), list[tuple[int, int]]()
    numbers = dict[int, int]()

    def pop() -> None:
        while (number := device.pop()) is not None:
            seen.append(tuple((s.address, s.length, s.writable) for s in device.segments(number)))

    def take() -> None:
        used.extend((numbers.pop(token), written) for token, written in driver.take())

    for act in (*map(Add, case.buffers), Publish(), *case.later, Publish(), Take()):
        match act:
            case Add(buffer):
                segments = [Segment(*each) for each in buffer.segments]
                table = case.tables + 16 * case.entries * (len(tokens) % case.size)
                plan = Plan((), segments, table) if buffer.indirect else Plan(segments)
                tokens.append(driver.add(plan))
                numbers[tokens[-1]] = len(tokens) - 1
            case Publish():
                driver.publish()
            case Push(which, written) | Use(which, written):
                pop()
                device.finish(which, bytes(written))
            case Take():
                take()
            case _:
                assert isinstance(act, Pop)
                pop()
    pop()
    return seen, used


@given(legal(), POLICIES)
def test_our_device_end_sees_what_the_model_sees(case: RingCase, policy: Name) -> None:
    with case.play(policy) as scene:
        found = scene.run()
        assert found.agrees(case.outcome(policy) or Outcome(0))
        seen, used = model(case)
        assert found.segments == tuple(seen)
        scene.do(Take())
        assert scene.used == used


@given(legal(end="driver"), POLICIES)
def test_our_driver_end_gets_what_the_models_gets(case: RingCase, policy: Name) -> None:
    with case.play(policy) as scene:
        found = scene.run()
        assert found.agrees(case.outcome(policy) or Outcome(0))
        assert found.used == tuple(model(case)[1])


@given(legal())
def test_a_legal_case_is_its_json(case: RingCase) -> None:
    assert RingCase.from_json(case.to_json()) == case


# ------------------------------------------------------------------------------------------- one request list, all ways

FEATURES = (0, INDIRECT_DESC, EVENT_IDX, IN_ORDER, INDIRECT_DESC | EVENT_IDX)
FORMS = [(packed, features) for packed in (False, True) for features in FEATURES]
REQUESTS = st.lists(st.tuples(st.binary(max_size=80), st.integers(0, 80)), min_size=1, max_size=4)
"""Of few bytes and few requests, so that they fit into every queue of 8 in any form."""


def answer(request: bytes) -> bytes:
    return bytes(byte ^ 0x5A for byte in request)[:40]


def in_form(requests: list[tuple[bytes, int]], seed: int, *, packed: bool, features: int) -> RingCase:
    """The same requests, cut and laid out in another way."""
    random = Random(seed)
    while True:
        case = legal_case(RandomDraw(random), packed=packed, features=features, requests=requests)
        if len(case.buffers) == len(requests):
            return case.but(later=(), interop=None, strict=None)


@given(REQUESTS, st.integers(0, 1 << 32))
def test_one_request_list_has_one_result_in_every_format(requests: list[tuple[bytes, int]], seed: int) -> None:
    """Split, packed, indirect, with and without event indices or order: what the driver gets is the same."""
    found = list[list[tuple[int, int, bytes]]]()
    for packed, features in FORMS:
        with in_form(requests, seed, packed=packed, features=features).play() as scene:
            assert oracles.device(scene).process(answer) == len(requests)
            found.append(sorted(scene.returned()))
    whole = [
        (number, n, answer(data)[:n])
        for number, (data, room) in enumerate(requests)
        for n in [len(answer(data)) if len(answer(data)) <= (room or not data) else 0]
    ]
    assert found == [whole] * len(FORMS)


@given(chains(st.binary(max_size=64), st.integers(0, 64)))
def test_a_chain_carries_its_request(case: RingCase) -> None:
    with case.play("strict") as scene:
        for buffer in case.buffers:
            chain = oracles.device(scene).pop()
            assert chain is not None
            assert chain.read() == buffer.data
            assert chain.writable == sum(length for _, length in buffer.writable)


# ---------------------------------------------------------------------------------------------------------------- chaos


class WatchedEnd:
    """A device end that `Watch` holds to V1 to V7 at every call."""

    def __init__(self, memory: GuestMemory, config: QueueConfig, state: QueueState) -> None:
        trace = memory.trace
        assert trace is not None
        self.queue = DeviceQueue(memory, config, state=state)
        self.watch = Watch(self.queue, trace, legal=False)
        self.forget = trace.clear

    # What the driver did between two calls is in the trace as well, and none of ours.
    def has_work(self) -> bool:
        self.forget()
        self.watch.others()
        return False

    def pop(self) -> Chain | None:
        self.forget()
        return self.watch.pop()

    def push(self, chain: Any, written: int | None = None, /) -> bool:
        self.forget()
        count = min(chain.writable, 64) if written is None else written
        if self.queue.latched is None:
            if chain.readable < 1 << 20:
                self.watch.read(chain)
            self.watch.write(chain, b"\xff" * count)
        done = self.watch.push(chain, count)
        assert done == (self.queue.latched is None)
        return done


def survive(case: RingCase, policy: Name) -> Outcome:
    """Play it; what is found broken is found once, and everything is kept within its bounds."""
    if case.end == "driver":
        return survive_at_the_driver(case, policy)
    with case.play(policy, device=WatchedEnd, traced=True) as scene:
        found = scene.run()
        end = scene.device
        assert isinstance(end, WatchedEnd)
        assert end.queue.in_flight <= case.size
        assert (end.queue.latched is None) == (found.rule is None)
        assert end.pop() is None or found.rule is None, "V9"
        pushed = {act.which for act in case.later if isinstance(act, Push)}
        for number, chain in enumerate(scene.chains):
            if number not in pushed:
                end.push(chain)
        return found


def survive_at_the_driver(case: RingCase, policy: Name) -> Outcome:
    """Each token comes back once: used, or from `detach`; nothing is written outside the driver's own areas."""
    with case.play(policy, traced=True) as scene:
        found = scene.run()
        driver = scene.driver
        assert (driver.latched is None) == (found.rule is None)
        if found.rule is not None:
            assert driver.get_used() is None
        back = [number for number, _ in scene.used] + [scene.number(token) for token in driver.detach()]
        assert sorted(back) == list(range(scene.added))
        for number, written in scene.used:
            assert 0 <= written <= sum(length for _, length in case.buffers[number].writable)
        return found


@given(chaos(), POLICIES)
def test_chaos_keeps_the_invariants(case: RingCase, policy: Name) -> None:
    event(f"{survive(case, policy).rule}")


@given(chaos(end="driver"), POLICIES)
def test_no_buffer_gets_lost_in_chaos(case: RingCase, policy: Name) -> None:
    event(f"{survive(case, policy).rule}")


@given(st.binary(min_size=64, max_size=512), st.booleans())
def test_random_bytes_are_survived(content: bytes, packed: bool) -> None:
    """Nothing legal at all: the ring is noise."""
    survive(RingCase(packed=packed, title="noise", writes=(Write(0x1000, (content * 16)[:512]),)), "interop")


def test_chaos_breaks_rules_of_every_kind() -> None:
    """Else it would show little: these seeds meet most rules that a running queue knows."""
    random = Random(1)
    found = {survive(chaos_case(RandomDraw(random), end=end), "strict").rule for end in ENDS for _ in range(1500)}
    assert len(found) > 15
    assert {None, "HeadOutOfRange", "UnmappedAddress", "ChainTooLong", "UsedIdOutOfRange", "UsedLenTooBig"} <= found


# ---------------------------------------------------------------------------------------------------------------- races

FIELDS = {
    False: ("desc.addr", "desc.len", "desc.flags", "desc.next", "avail.idx", "avail.ring"),
    True: ("desc.addr", "desc.len", "desc.flags", "desc.id"),
}


@pytest.mark.row("T01", "T02", "T03", "T04", "T05", "T06", "T07", "T09")
@given(st.data(), st.booleans(), st.sampled_from((0, INDIRECT_DESC)), POLICIES)
def test_a_race_has_the_result_of_one_snapshot(data: st.DataObject, packed: bool, features: int, policy: Name) -> None:
    """Any field changes to anything just before access n of the pop of one chain, for every n: each is read once."""
    requests = [(bytes(8), 8)]
    case = legal_case(
        RandomDraw(Random(data.draw(st.integers(0, 99)))), packed=packed, features=features, requests=requests
    )
    names = FIELDS[packed] + (("table.len", "table.flags", "table.addr") if features else ())
    field = data.draw(st.sampled_from(names))
    places = case.layout().fields().get(field, (0, 0, 0, 8))[3]
    place = data.draw(st.integers(0, min(places, 8) - 1))
    with case.play() as scene:
        value = data.draw(st.integers(0, (1 << 8 * scene.at(field, place)[1]) - 1) | st.integers(0, 9))

    def outcome(number: int | None) -> tuple[Outcome, int]:
        race = () if number is None else (Race(number, field, value, place),)
        with case.but(later=(*race, Pop())).play(policy, traced=True) as scene:
            trace = scene.memory.trace
            assert trace is not None
            if number is None:
                trace.clear()
            return one(scene), len(trace.log())

    before, count = outcome(None)
    after, _ = outcome(0)
    for number in range(1, count):
        assert outcome(number)[0] in (before, after), f"{field}[{place}] = {value:#x} before access {number}"


def one(scene: Scene) -> Outcome:
    """What the acts make of it, without taking what is left."""
    try:
        for act in scene.case.later:
            scene.do(act)
    except QueueViolation as violation:
        scene.violation = violation
    return scene.outcome


# ----------------------------------------------------------------------------------------------------------------- deep


@pytest.mark.deep
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("part", range(10))
def test_a_million_cases(part: int) -> None:
    """In ten parts: half of them one defect, the others chaos at either end, judged like those of the quick tests."""
    random = Random(part)
    draw = RandomDraw(random)
    for number in range(50_000):
        case = random_case(random)
        policy: Name = "interop" if number & 1 else "strict"
        wanted = case.outcome(policy)
        with case.play(policy, traced=True) as scene:
            assert wanted is not None
            assert wanted.agrees(scene.run())
            oracles.judge(scene)
        survive(chaos_case(draw, end="driver" if number & 2 else "device"), policy)
