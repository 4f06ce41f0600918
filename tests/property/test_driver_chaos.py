"""Our driver end against a device that does anything at any time: no token is lost, none comes back twice."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from virtio_test._core import Policy
from virtio_test.errors import QueueFull, QueueViolation

from tests.property.bench import AVAIL, DATA, USED, W
from tests.property.driver_bench import DriverBench
from tests.property.ends import EVENT_IDX, IN_ORDER

SIZES = [1, 2, 8]
LIKELY: dict[str, list[int]] = {
    "desc.flags": [AVAIL | USED, AVAIL | USED | W, 0, W, AVAIL, USED],
    "desc.id": list(range(10)),
    "desc.len": [0, 1, 32, 64, 65, 257, 1 << 31],
    "used.idx": list(range(10)),
    "used.ring.id": [*range(10), 1 << 16],
    "used.ring.len": [0, 1, 32, 64, 65, 257, 1 << 31],
}
"""What the device owns, and what is nearly right there."""
Action = tuple[str, int, int]


@st.composite
def actions(draw: st.DrawFn) -> list[Action]:
    """Rounds: buffers go out, some are used well, the device writes what it likes, the driver looks."""
    script = list[Action]()
    for _ in range(draw(st.integers(1, 6))):
        script += [("add", draw(st.integers(1, 3)), draw(st.integers(1, 64))) for _ in range(draw(st.integers(0, 3)))]
        script.append(("publish", 0, 0) if draw(st.booleans()) else ("signal", 0, 0))
        script += [("use", 0, draw(st.integers(0, 64))) for _ in range(draw(st.integers(0, 2)))]
        for name in draw(st.lists(st.sampled_from(sorted(LIKELY)), max_size=4)):
            script.append((name, draw(st.integers(0, 3)), draw(st.sampled_from(LIKELY[name]))))
        if draw(st.integers(0, 7)) == 0:
            script.append(("scribble", draw(st.integers(0, 1 << 10)), draw(st.integers(0, 2**64 - 1))))
        script.append((draw(st.sampled_from(["take", "take", "arm", "disarm"])), 0, 0))
    return script


@given(
    st.booleans(),
    st.sampled_from(SIZES),
    st.sampled_from([0, EVENT_IDX, IN_ORDER]),
    st.sampled_from([Policy.interop, Policy.strict]),
    actions(),
)
def test_every_token_comes_back_once(
    packed: bool, size: int, features: int, policy: Policy, script: list[Action]
) -> None:
    bench = DriverBench(packed, policy, features=features, size=size)
    queue, layout = bench.queue, bench.queue.layout()
    fields = [(name, index) for name, (_, _, _, count) in layout.fields().items() for index in range(count)]
    given_out, back, violations = dict[int, int](), list[int](), 0
    for name, first, second in script:
        try:
            if name == "add":
                buffers = [(DATA + 64 * number, second) for number in range(min(first, size))]
                given_out[queue.add([], buffers)] = second * len(buffers)
            elif name == "publish":
                queue.publish()
            elif name == "signal":
                queue.signal()
            elif name == "take":
                used = queue.get_used_many(3)
                assert all(0 <= written <= given_out[token] for token, written in used)
                back += [token for token, _ in used]
            elif name == "arm":
                queue.enable_calls()
            elif name == "disarm":
                queue.disable_calls()
            elif name == "use":
                legal_use(bench, second)
            elif name == "scribble":
                field, index = fields[first % len(fields)]
                bench.put(field, second % (1 << 8 * layout.fields()[field][1]), index)
            elif name in layout.fields():
                bench.put(name, second, first % layout.fields()[name][3])
        except QueueFull:
            assert name == "add"
        except QueueViolation as violation:
            event(violation.rule)
            violations += 1
            break
    assert violations <= 1
    assert (queue.latched is None) == (violations == 0)
    if violations:
        assert queue.get_used() is None
    back += queue.detach()
    assert sorted(back) == sorted(given_out)
    stores = [access.address for access in bench.trace.log() if access.kind in ("store", "write")]
    assert all(layout.desc <= address < layout.driver + layout.driver_bytes for address in stores)


def legal_use(bench: DriverBench, written: int) -> None:
    """What a device does that is well this time; where the ring is nonsense by now, it does nothing."""
    try:
        element = bench.device.pop()
    except (AssertionError, ValueError):
        return
    if element is not None:
        bench.device.push((element, min(written, element.writable)))


# ---------------------------------------------------------------------------------------------------------------- races

Outcome = tuple[object, ...]


def story(bench: DriverBench) -> Outcome:
    try:
        used = bench.queue.get_used_many()
    except QueueViolation as violation:
        return "violation", violation.rule, bench.queue.detach()
    return "used", used, bench.queue.in_flight


def changes(bench: DriverBench) -> Iterator[tuple[str, int, int]]:
    names = ["desc.id", "desc.len", "desc.flags"] if bench.packed else ["used.idx", "used.ring.id", "used.ring.len"]
    for name in names:
        for index in range(1 if name == "used.idx" else 2):
            for value in (0, 1, 2, 3, 9, 33, 0xFFFF, AVAIL, USED, AVAIL | USED):
                yield name, index, value


@pytest.mark.parametrize("policy", [Policy.interop, Policy.strict], ids=["interop", "strict"])
@pytest.mark.parametrize("features", [0, IN_ORDER])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_race_over_used_entries_has_the_result_of_one_snapshot(packed: bool, features: int, policy: Policy) -> None:
    """Two used buffers, and any field of the device's changing before any access: each field is read once."""

    def run(change: tuple[str, int, int] | None = None, at: int = 0) -> tuple[Outcome, int]:
        bench = DriverBench(packed, policy, features=features)
        bench.publish(3)
        for written in (5, 6):
            bench.device.push((bench.pop(), written))
        bench.trace.clear()
        if change:
            name, index, value = change
            address, width = bench.queue.layout().at(name, index), bench.queue.layout().fields()[name][1]
            bench.trace.change_at(at, address, value.to_bytes(width, "little"))
        return story(bench), len(bench.trace.log())

    before, count = run()
    assert before == ("used", [(0, 5), (1, 6)], 1)
    late = 0
    for change in changes(DriverBench(packed)):
        after = run(change)[0]
        for number in range(1, count):
            outcome = run(change, number)[0]
            # used.idx is read again when its buffers are used up: then it may have gone back, or on.
            assert outcome in (before, after) or change[0] == "used.idx", f"{change} before access {number} of {count}"
            late += outcome == before != after
    assert late > 0
