"""Attacks while the device has something in flight: resets, what comes twice, what is too much, and order.

The device is that of `late`. Nothing of what it answers too late may reach memory, and no interrupt comes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from virtio_test.features import FeatureSet
from virtio_test.spec.pci import CapType
from virtio_test.spec.pcibus import COMMAND_INTX_DISABLE, COMMAND_IO, COMMAND_MASTER, COMMAND_MEMORY, HEADER
from virtio_test.spec.testdevice import RESPONSE

from tests.kernel.attack.case import NUMBER, Case, Machine, Steps, Verdict, verdict
from tests.kernel.attack.driver import (
    AVAIL,
    BASIC,
    CONFIG_VECTOR,
    INDIRECT,
    QUEUE_VECTOR,
    TABLE,
    USED,
    Queue,
    answer,
    kick,
    release,
    reset,
)
from tests.kernel.attack.pieces import NOWHERE, WHOLE, asked
from tests.kernel.attack.program import ANY_VECTOR, CONFIG, At, Program, Results

__all__ = ["CASES"]

_LIVE: Final = 15
_LOW, _HIGH = answer(NUMBER)
_UNTOUCHED: Final = 0xEEEE_EEEE_EEEE_EEEE
_ANSWERED: Final = {"len": RESPONSE.size, "low": _LOW, "high": _HIGH}


def _late(
    rows: str,
    name: str,
    run: Steps,
    wanted: Mapping[str, int],
    *,
    packed: bool = False,
    outcome: Verdict = "accepted",
    rules: str = "",
) -> Case:
    """An attack that is `outcome` when its steps bring back what is wanted."""
    return Case(
        rows=tuple(rows.split()),
        name=f"late-{name}",
        packed=packed,
        run=run,
        judge=lambda results: verdict(outcome, results, wanted),
        verdict=outcome,
        rules=tuple(rules.split()),
        needs="late",
    )


def _seen(p: Program, queue: Queue, *, position: int = 0) -> None:
    """What there is to be seen of one request, without waiting for it."""
    layout = queue.layout
    p.read("status", "device_status")
    if queue.packed:
        p.get("used", layout.at("desc.flags", 2 * position), 2)
    else:
        p.get("used", layout.at("used.idx"), 2)
    queue.answered(p, position=position)
    p.interrupts("config", CONFIG_VECTOR)
    p.interrupts("queue", QUEUE_VECTOR)


def _kept(p: Program, queue: Queue) -> None:
    """Start the queue, and give the device a request that it keeps."""
    queue.start(p)
    queue.ask(p, NUMBER, kicks=False)
    queue.kick_and_wait(p, "kept")


def _again(p: Program, queue: Queue) -> None:
    """A request in a queue that is as new, answered when the device is told to."""
    queue.ask(p, NUMBER, kicks=False)
    queue.kick_and_wait(p, "again.kept")
    release(p)
    queue.used(p, label="again.")
    queue.answered(p, label="again.")


_AGAIN: Final = {f"again.{name}": value for name, value in _ANSWERED.items()}


# --- taken back while it is in flight -----------------------------------------------------------------------


def _nothing_used(queue: Queue) -> dict[str, int]:
    """A request that nobody has answered: of a packed ring its head's flags are as the driver wrote them."""
    return {"used": AVAIL | 1 if queue.packed else 0, "low": _UNTOUCHED, "high": 0xEEEE_EEEE, "config": 0, "queue": 0}


def _taken_back(rows: str, name: str, take: Callable[[Program], object], queue: Queue, status: int) -> Case:
    """The driver takes back what the device keeps; what the device answers then is lost; the queue works anew."""

    def run(p: Program, _: Machine) -> None:
        _kept(p, queue)
        take(p)
        release(p)
        p.read("turn", "device_status")
        _seen(p, queue)
        if status == _LIVE:
            p.fill(0, 0x4000)
            queue.run(p)
        else:
            queue.start(p)
        _again(p, queue)

    return _late(rows, name, run, {**_nothing_used(queue), "status": status, **_AGAIN}, packed=queue.packed)


def _reset_queue(p: Program) -> None:
    p.out("queue_reset", 1)
    p.until("queue_reset", "queue_reset", 0)


_RESETTABLE: Final = FeatureSet("RING_RESET") | BASIC
_TAKEN: Final = [
    case
    for packed in (False, True)
    for case in (
        _taken_back(
            "D08 D09 CVE-2026-45782 CVE-2026-50624", "reset", lambda p: reset(p, "mid"), Queue(packed=packed), 0
        ),
        _taken_back("X11 D09", "function-reset", lambda p: p.reset_function("errno"), Queue(packed=packed), 0),
        _taken_back("Q13", "queue-reset", _reset_queue, Queue(packed=packed, features=_RESETTABLE), _LIVE),
    )
]

# --- more than there is room for, and the same twice --------------------------------------------------------


def _tables(p: Program, queue: Queue, *, ids: tuple[int, ...]) -> None:
    """As many requests as there are ids, each one descriptor with a table, the last one written first."""
    asked(p)
    for index, entry in enumerate(WHOLE):
        queue.entry(p, index, *entry)
    for index, identity in reversed(list(enumerate(ids))):
        queue.desc(p, index, At(TABLE), 32, INDIRECT, identity if queue.packed else 0)


def _twice(packed: bool) -> Case:
    """Two requests of the same head, or id, in flight at once."""
    queue = Queue(packed=packed)

    def run(p: Program, _: Machine) -> None:
        queue.start(p)
        _tables(p, queue, ids=(3, 3))
        queue.publish(p, 0, 0)
        queue.kick_and_wait(p, "kept")
        p.interrupts("early", QUEUE_VECTOR)
        release(p)
        p.interrupts("any", ANY_VECTOR, 1)
        _seen(p, queue)
        if packed:
            p.get("second", queue.layout.at("desc.flags", 1), 2)

    def judge(results: Results) -> str:
        facts = dict(results)
        if packed:
            facts["used"] = sum(facts[each] & (AVAIL | USED) == AVAIL | USED for each in ("used", "second"))
        facts["queue"] = min(facts["queue"], 1)
        if facts["status"] & 0x40:
            return verdict("broken", facts, {"used": 0, "config": 1, "queue": 0})
        wanted = {"status": _LIVE, "used": 2, "low": _LOW, "high": _HIGH, "config": 0, "early": 0, "queue": 1}
        return verdict("accepted", facts, wanted)

    rows, rule = ("P07", "IdInFlight") if packed else ("A05 A06", "HeadInFlight")
    case = _late(rows, "twice", run, {}, packed=packed)
    return replace(case, judge=judge, strict=("broken", (rule,)))


def _too_many(packed: bool) -> Case:
    """One more than the queue has room for; what was kept is lost with it."""
    queue = Queue(packed=packed, size=4)

    def run(p: Program, _: Machine) -> None:
        queue.start(p)
        _tables(p, queue, ids=(0, 1, 2, 3))
        queue.publish(p, 0, 1, 2, 3)
        queue.kick_and_wait(p, "kept")
        if packed:
            queue.desc(p, 0, At(TABLE), 32, INDIRECT ^ (AVAIL | USED), 9)
        else:
            queue.put(p, "avail.idx", 0, 5)
        kick(p)
        p.interrupts("told", CONFIG_VECTOR, 1)
        release(p)
        p.read("turn", "device_status")
        _seen(p, queue)

    wanted = {"status": _LIVE | 0x40, "told": 1, "config": 1, "queue": 0, "used": USED | INDIRECT if packed else 0}
    rows = "P24 CVE-2016-5403" if packed else "A06 CVE-2016-5403"
    return _late(rows, "too-many", run, wanted, packed=packed, outcome="broken", rules="TooManyInFlight")


def _lost_with_it(packed: bool) -> Case:
    """The device breaks over the second chain; the first, which it keeps, is not used any more."""
    queue = Queue(packed=packed)

    def run(p: Program, _: Machine) -> None:
        _kept(p, queue)
        queue.desc(p, 2, NOWHERE, 16, 0)
        if not packed:
            queue.put(p, "avail.ring", 1, 2)
            queue.put(p, "avail.idx", 0, 2)
        kick(p)
        p.interrupts("told", CONFIG_VECTOR, 1)
        release(p)
        p.read("turn", "device_status")
        _seen(p, queue)

    wanted = {**_nothing_used(queue), "status": _LIVE | 0x40, "told": 1, "config": 1}
    return _late("D16 N07 B03", "broken-behind", run, wanted, packed=packed, outcome="broken", rules="UnmappedAddress")


# --- order, vectors, bus mastering, configuration -----------------------------------------------------------


def _newest_first(packed: bool) -> Case:
    """Two requests of two descriptors each, answered in the other order."""
    queue = Queue(packed=packed)
    ids = (5, 6) if packed else (0, 2)

    def run(p: Program, _: Machine) -> None:
        queue.start(p)
        for position in (0, 1):
            queue.ask(p, NUMBER, position=position, kicks=False, identity=5 + position)
        queue.kick_and_wait(p, "kept")
        release(p, 2)
        queue.used(p, position=1, label="second.")
        queue.used(p, label="first.") if packed else p.get("first.id", queue.layout.at("used.ring.id", 0), 4)
        queue.answered(p)
        queue.answered(p, position=1, label="other.")

    wanted = {"first.id": ids[1], "second.id": ids[0], "low": _LOW, "high": _HIGH, "other.low": _LOW, "second.len": 12}
    return _late("P20" if packed else "U07", "newest-first", run, wanted, packed=packed)


def _moved_vector(p: Program, _: Machine) -> None:
    queue = Queue()
    _kept(p, queue)
    p.out("queue_msix_vector", CONFIG_VECTOR)
    release(p)
    p.interrupts("config", CONFIG_VECTOR, 1)
    p.interrupts("queue", QUEUE_VECTOR)
    queue.used(p)
    queue.answered(p)


_COMMAND: Final = HEADER["command"][0]
_WITHOUT: Final = COMMAND_INTX_DISABLE | COMMAND_IO | COMMAND_MEMORY


def _no_master(p: Program, _: Machine) -> None:
    """What is answered while the function may not use memory is written when it may again."""
    queue = Queue()
    _kept(p, queue)
    p.out_at(CONFIG, _COMMAND, 2, _WITHOUT)
    release(p)
    p.read("turn", "device_status")
    p.get("unused", queue.layout.at("used.idx"), 2)
    p.out_at(CONFIG, _COMMAND, 2, _WITHOUT | COMMAND_MASTER)
    queue.used(p)
    queue.answered(p)


def _configured(p: Program, _: Machine) -> None:
    """The device changes its configuration: the generation moves once, and one interrupt says so."""
    Queue().start(p)
    for turn in (0, 1):
        p.forget()
        # It moves for what somebody has read before.
        p.read_at(f"{turn}.old", CapType.DEVICE_CFG, 0, 4)
        p.read(f"{turn}.before", "config_generation")
        p.out_at(CapType.DEVICE_CFG, 4, 4, 7 + turn)
        p.interrupts(f"{turn}.told", CONFIG_VECTOR, 1)
        p.read_at(f"{turn}.num_pages", CapType.DEVICE_CFG, 0, 4)
        for name in ("after", "still"):
            p.read(f"{turn}.{name}", "config_generation")


def _configured_case() -> Case:
    wanted = {f"{turn}.num_pages": 7 + turn for turn in (0, 1)} | {"0.told": 1, "1.told": 1}
    case = _late("X08", "configuration", _configured, wanted)

    def judge(results: Results) -> str:
        for turn in (0, 1):
            before, after, still = (results[f"{turn}.{name}"] for name in ("before", "after", "still"))
            if before == after or after != still:
                return f"the generation was {before}, then {after}, then {still}"
        return case.judge(results)

    return replace(case, judge=judge)


CASES: Final[list[Case]] = [
    *_TAKEN,
    *(make(packed) for make in (_twice, _too_many, _lost_with_it, _newest_first) for packed in (False, True)),
    _late("X12", "vector-moved", _moved_vector, {"config": 1, "queue": 0, **_ANSWERED}),
    _late("X10", "no-bus-master", _no_master, {"unused": 0, **_ANSWERED}),
    _configured_case(),
]
