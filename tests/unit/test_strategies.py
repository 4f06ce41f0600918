"""`virtio_test.strategies` as its users meet it: the parts, the errors, what a failure says, and without Hypothesis."""

from __future__ import annotations

import doctest
import json
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
import virtio_test.strategies
from hypothesis import given, settings
from hypothesis import strategies as st
from virtio_test import (
    DeviceQueue,
    FeatureSet,
    GuestMemory,
    Policy,
    QueueConfig,
    QueueState,
    RingLayout,
    TestDevice,
    VirtioPci,
)
from virtio_test.device import RING_FEATURES
from virtio_test.errors import InvalidArgument
from virtio_test.strategies import (
    ROWS,
    CaseFailed,
    Fill,
    MessageProgram,
    Outcome,
    PciTarget,
    Peek,
    ProgramFailed,
    Put,
    RandomDraw,
    RegisterProgram,
    RingCase,
    any_messages,
    any_program,
    cases,
    defects,
    drawn,
    every,
    feature_sets,
    legal,
    legal_messages,
    legal_program,
    load,
    memory_maps,
    message_cases,
    partitions,
    policies,
    queue_sizes,
    queue_starts,
    random_case,
    register_cases,
    save,
)
from virtio_test.strategies.draw import Draw


def test_the_examples_of_the_docstring() -> None:
    assert doctest.testmod(virtio_test.strategies) == (0, 4)


@given(memory_maps())
def test_memory_maps_can_be_mapped_and_hold_the_ring(regions: list[tuple[int, int]]) -> None:
    memory = GuestMemory(regions, backing="anonymous")
    assert memory.is_mapped(0, 0x8000)
    assert max(address + size for address, size in regions) <= 0x10000


@given(st.data(), st.booleans(), policies())
def test_sizes_and_starts_make_queues(data: st.DataObject, packed: bool, policy: Policy) -> None:
    size = data.draw(queue_sizes(packed=packed))
    start = data.draw(queue_starts(size, packed=packed))
    layout = RingLayout.contiguous(size, 0, packed=packed)
    memory = GuestMemory([(0, 0x4000)], backing="anonymous")
    config = QueueConfig.from_layout(layout, policy=policy)
    assert DeviceQueue(memory, config, state=QueueState(start)).state == QueueState(start, start)


@given(feature_sets(), feature_sets(always=FeatureSet()))
def test_feature_sets_are_part_of_the_offer(one: FeatureSet, other: FeatureSet) -> None:
    assert FeatureSet("VERSION_1") <= one <= RING_FEATURES
    assert other <= RING_FEATURES


@given(st.integers(0, 500), st.integers(1, 8), st.data())
def test_partitions_add_up(length: int, most: int, data: st.DataObject) -> None:
    parts = data.draw(partitions(length, most=most))
    assert sum(parts) == length
    assert all(parts)
    assert len(parts) <= most


@given(defects("A04"))
def test_a_row_is_what_was_asked_for(case: RingCase) -> None:
    assert case.row == "A04"
    case.check()


def test_rows_that_are_not_there_are_told() -> None:
    for call in (lambda: list(cases("Z99")), lambda: defects(("A01", "Z99")), lambda: random_case(Random(1), "Z99")):
        with pytest.raises(InvalidArgument, match=r"no mutator for Z99; rows are A01, "):
            call()


def test_the_same_seed_makes_the_same_case() -> None:
    assert random_case(Random(7)) == random_case(Random(7))
    assert len({random_case(Random(seed)) for seed in range(300)}) > 200


def test_every_takes_each_way_once() -> None:
    def generator(draw: Draw) -> tuple[object, ...]:
        first = draw.choice("ab")
        second = draw.integer(1, 3) if first == "a" else draw.choice((7,))
        return first, second, draw.some((0, 1)), draw.vary(0, 9, 4)

    assert list(every(generator)) == [("a", 1, 0, 4), ("a", 3, 0, 4), ("b", 7, 0, 4)]
    drawn = {generator(RandomDraw(Random(seed))) for seed in range(200)}
    assert {each[2] for each in drawn} == {0, 1}
    assert {each[1] for each in drawn} == {1, 2, 3, 7}


# -------------------------------------------------------------------------------------------------- what a failure says


class Deaf:
    """A device end of somebody's own, which sees nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def has_work(self) -> bool:
        return False

    def pop(self) -> None:
        return None

    def push(self, chain: object, written: int | None = None, /) -> None:
        raise AssertionError(chain, written)


def test_a_failure_names_the_case_and_prints_a_script_that_replays_it() -> None:
    with pytest.raises(CaseFailed, match=r"^A04-split-head_0x8 under interop: ") as caught:
        next(cases("A04")).check(device=Deaf)
    (note,) = caught.value.__notes__
    shown, _, script = note.partition("\n\nThis replays it:\n\n")
    assert eval(shown, {"RingCase": RingCase, "Put": Put, "Outcome": Outcome, "Buffer": virtio_test.strategies.Buffer})
    compile(script, "script", "exec")
    assert caught.value.case == next(cases("A04"))  # type: ignore[attr-defined]


def test_hypothesis_shows_it_too() -> None:
    @settings(database=None, max_examples=20)
    @given(legal())
    def deaf(case: RingCase) -> None:
        case.check(device=Deaf)

    with pytest.raises(CaseFailed) as caught:
        deaf()
    assert any("DriverQueue(memory" in note for note in caught.value.__notes__)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (Put("avail.odd", 1), r"^avail.odd is no field of this ring: it has "),
        (Put("desc.id", 1), r"^desc.id is no field of this ring: it has "),
        (Put("avail.idx", 1 << 16), r"^avail.idx has 2 bytes, which cannot hold 0x10000\n"),
        (Fill("desc.next", 0xFFFF, 1, 2), r"^desc.next has 2 bytes"),
        (Put("avail.ring", 1, 8), "index"),
    ],
)
def test_a_change_that_cannot_be_made_is_told(change: Put | Fill, told: str) -> None:
    with pytest.raises(InvalidArgument, match=told):
        RingCase(writes=(change,)).run()


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"end": "front"}, "'front' is no end: device, driver"),
        ({"areas": {"used": 1}}, "'used' is no area: size, desc, driver, device"),
        ({"switches": {"odd": True}}, "'odd' is no switch: zero_length, "),
    ],
)
def test_a_case_with_names_that_nobody_knows_is_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{told}"):
        RingCase(**fields)
    with pytest.raises(InvalidArgument):
        RingCase.from_json(json.dumps({"virtio-test": "ring-case", "version": 1, **fields}))


def test_a_change_of_nothing_changes_nothing() -> None:
    case = RingCase(writes=(Fill("desc.next", 1, 1, 0),))
    assert case.run() == RingCase().run() == Outcome(0, segments=())


def test_one_folder_keeps_all_kinds(tmp_path: Path) -> None:
    """And a program that fails carries itself as a ring case does, so the plugin keeps it."""
    ring, registers, messages = next(cases("A04")), next(register_cases("Q02")), next(message_cases("M01"))
    names = [save(each, tmp_path).stem for each in (ring, registers, messages)]
    assert list(load(tmp_path)) == [(names[0], ring)]
    assert list(load(tmp_path, RegisterProgram)) == [(names[1], registers)]
    assert list(load(tmp_path, MessageProgram)) == [(names[2], messages)]
    wrong = RegisterProgram(steps=(Peek("common", 20, 1, value=0x99),))
    with pytest.raises(ProgramFailed) as caught:
        wrong.check(PciTarget(VirtioPci(TestDevice())))
    assert caught.value.case == wrong
    assert caught.value.__notes__[0] == wrong.to_json()
    assert "This replays it" in caught.value.__notes__[1]
    assert RegisterProgram.from_json(caught.value.__notes__[0]) == wrong


@given(drawn(any_program), drawn(any_messages), drawn(legal_program), drawn(legal_messages))
def test_other_generators_are_strategies_too(
    one: RegisterProgram, two: MessageProgram, three: RegisterProgram, four: MessageProgram
) -> None:
    for program in (one, three):
        assert RegisterProgram.from_json(program.to_json()) == program
    for program in (two, four):
        assert MessageProgram.from_json(program.to_json()) == program


def test_without_hypothesis_one_line_says_what_is_missing() -> None:
    """And all that does not need it works."""
    program = """
import sys
sys.modules["hypothesis"] = None
from pathlib import Path
from random import Random
from virtio_test.strategies import cases, random_case
random_case(Random(1)).check()
next(cases("P04")).check()
try:
    from virtio_test.strategies import legal
except ImportError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "strategies.legal needs Hypothesis: pip install 'virtio-test[hypothesis]'\n"


def test_what_there_is_is_listed() -> None:
    assert set(virtio_test.strategies.__all__) <= set(dir(virtio_test.strategies))
    assert all(getattr(virtio_test.strategies, name) is not None for name in virtio_test.strategies.__all__)
    with pytest.raises(AttributeError, match=r"no attribute 'odd'"):
        virtio_test.strategies.odd  # noqa: B018
    assert "A04" in ROWS
