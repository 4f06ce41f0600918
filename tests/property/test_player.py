"""A case played in one call comes to what it comes to act by act; what the call does not know is left to the scene."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import pytest
from virtio_test._core import GuestMemory, Player, Policy
from virtio_test.errors import InvalidArgument
from virtio_test.strategies import ROWS, Put, RandomDraw, RingCase, cases, random_case
from virtio_test.strategies.acts import (
    Act,
    Add,
    Buffer,
    Copy,
    Fill,
    Look,
    Map,
    Pop,
    Publish,
    Push,
    Take,
    Unmap,
    Use,
    Write,
)
from virtio_test.strategies.case import EDGE, LOW, PAGE, RAM, CaseFailed, Name, Outcome
from virtio_test.strategies.noise import chaos_case
from virtio_test.strategies.scene import Stage
from virtio_test.strategies.traffic import legal_case

POLICIES: tuple[Name, ...] = ("interop", "strict")
SINGLE = RingCase(buffers=(Buffer((), ((0x8000, 32),)),))


def by_scene(case: RingCase, policy: Name) -> Outcome:
    with case.play(policy) as scene:
        return scene.run()


def both(stage: Stage, case: RingCase) -> int:
    """How often of two times it was played in one call, which must be as by a scene."""
    found = [stage.outcome(case, case.policy(name)) for name in POLICIES]
    for name, outcome in zip(POLICIES, found, strict=True):
        assert outcome in (None, by_scene(case, name)), f"{case} under {name}"
    return sum(outcome is not None for outcome in found)


@pytest.mark.parametrize("row", ROWS)
def test_one_defect(row: str) -> None:
    stage, random = Stage(), Random(row)
    every = [*cases(row), *(random_case(random, row) for _ in range(8))]
    known = sum(both(stage, case) for case in every)
    unknown = sum(case.traced or any(isinstance(act, Map) for act in case.later) for case in every)
    assert known >= 2 * (len(every) - unknown)


def any_cases(random: Random) -> Iterator[RingCase]:
    draw = RandomDraw(random)
    yield legal_case(draw)
    yield legal_case(draw, end="driver")
    yield chaos_case(draw)
    yield chaos_case(draw, end="driver")


def test_legal_and_chaos() -> None:
    stage, random = Stage(), Random(6)
    known = sum(both(stage, case) for _ in range(150) for case in any_cases(random))
    assert known == 150 * 4 * 2, "all of them are played in one call"


@pytest.mark.parametrize(
    "case",
    [
        SINGLE.but(writes=(Put("no.field", 0),)),
        SINGLE.but(writes=(Put("avail.idx", 1 << 16),)),
        SINGLE.but(writes=(Put("avail.idx", -1),)),
        SINGLE.but(writes=(Put("desc.addr", 0, 8),)),
        SINGLE.but(writes=(Fill("desc.len", 1, 1, 9),)),
        SINGLE.but(writes=(Fill("avail.ring", 0xFFFF, 1, 2),)),
        SINGLE.but(writes=(Write(EDGE + PAGE - 1, b"ab"),)),
        SINGLE.but(writes=(Unmap(LOW, PAGE),)),
        SINGLE.but(later=(Pop(), Push(0, 33))),
        SINGLE.but(later=(Pop(), Push(0), Push(0))),
        SINGLE.but(buffers=(Buffer((), ((0x8000, 1 << 32),)),)),
        SINGLE.but(buffers=(Buffer(),)),
        SINGLE.but(size=7),
        SINGLE.but(size=0),
        SINGLE.but(ring=0x1008),
        SINGLE.but(ring=2**64 - 16),
        SINGLE.but(tables=8, buffers=(SINGLE.buffers[0]._replace(indirect=True),)),
        SINGLE.but(entries=0, buffers=(SINGLE.buffers[0]._replace(indirect=True),)),
        SINGLE.but(packed=True, start=9),
    ],
    ids=lambda case: repr(case)[9:60],
)
def test_what_is_wrong_is_left_to_the_scene(case: RingCase) -> None:
    assert Stage().outcome(case, Policy.interop) is None
    with pytest.raises(Exception) as raised:  # noqa: PT011 (each has its own, and the scene's are tested elsewhere)
        case.run("interop")
    assert "This replays it" in raised.value.__notes__[0]


def test_a_full_ring_is_drained_all_the_same() -> None:
    case = SINGLE.but(size=1, later=(Add(SINGLE.buffers[0]), Look()))
    assert (
        Stage().outcome(case, Policy.strict)
        == by_scene(case, "strict")
        == Outcome(1, None, segments=((SINGLE.buffers[0].segments[0],),))
    )


def assert_zeros(stage: Stage, case: RingCase) -> None:
    memory, _ = stage._clean.get(case.regions, (None, 0))  # pyright: ignore[reportPrivateUsage]
    for address, size, _ in case.regions if memory is not None else ():
        assert memory is not None
        assert not any(memory.read(address, size)), f"{case} leaves something at {address:#x}"


def test_memory_is_zeros_again_after_each_case() -> None:
    stage, random = Stage(), Random(7)
    for case in (*cases(), *(case for _ in range(50) for case in any_cases(random))):
        if sum(size for _, size, _ in case.regions) > 1 << 20:
            continue
        stage.outcome(case, Policy.interop)
        assert_zeros(stage, case)


@pytest.mark.parametrize("ring", [0xFF60, 0xFFA0, 0xFFE0, EDGE - 0x60])
def test_memory_is_zeros_again_where_a_ring_lies_in_no_one_region(ring: int) -> None:
    stage = Stage()
    for end in ("device", "driver"):
        for packed in (False, True):
            case = RingCase(end=end, packed=packed, ring=ring, start=1, writes=(Put("desc.addr", 0x11223344, 1),))
            stage.outcome(case, Policy.interop)
            assert_zeros(stage, case)
            elsewhere = case.but(areas={"desc": 0x1000, "driver": 0x1100, "device": 0x1200}, later=case.writes)
            stage.outcome(elsewhere, Policy.interop)
            assert_zeros(stage, elsewhere)


def test_memory_is_zeros_again_and_one_that_was_changed_is_not_used_again() -> None:
    stage = Stage()
    dirty: tuple[Act, ...] = (Write(0x8000, b"\xff" * 0x1000), Put("avail.flags", 1), Unmap(EDGE, PAGE))
    clean = SINGLE.but(buffers=(Buffer(((0xF000, 16),)),))
    before = stage.outcome(clean, Policy.strict)
    assert before == by_scene(clean, "strict")
    assert stage.outcome(SINGLE.but(later=dirty), Policy.strict) is not None
    assert stage.outcome(clean, Policy.strict) == before


def test_what_fails_is_told_with_the_script_that_replays_it() -> None:
    with pytest.raises(CaseFailed) as raised:
        SINGLE.but(interop=Outcome(2)).check("interop")
    assert "This replays it" in raised.value.__notes__[0]


@pytest.mark.parametrize("where", ["case", "memory"])
def test_an_interrupt_is_not_taken_for_an_unusual_case(where: str) -> None:
    def interrupted(*_: object) -> bytes:
        raise KeyboardInterrupt

    class Interrupted:
        end = property(interrupted)

    memory = GuestMemory()
    for address, size, _ in RAM:
        memory.add_remote(address, size, read=interrupted, write=interrupted)
    player = Player((Put, Fill, Write, Copy, Unmap, Look, Pop, Push, Add, Publish, Take, Use), index=0)
    with pytest.raises(KeyboardInterrupt):
        player.play(memory, SINGLE if where == "memory" else Interrupted(), Policy.strict)
    # It was raised, so it is not raised again.
    with pytest.raises(KeyboardInterrupt):
        memory.write(RAM[0][0], b"1")
    memory.replace([])
    assert player.play(memory, SINGLE, Policy.strict) is None


def test_a_player_knows_its_acts() -> None:
    with pytest.raises(InvalidArgument):
        Player((Put,), index=0)
    memory = GuestMemory([(address, size) for address, size, _ in RAM])
    nothing = Player((int,) * 12, index=0)
    assert nothing.play(memory, SINGLE.but(writes=(Put("avail.idx", 0),)), Policy.strict) is None
    assert nothing.play(memory, object(), Policy.strict) is None
    assert nothing.play(memory, SINGLE, Policy.strict) is not None
