"""`Case`: one attack, what it does in the guest, and what must come of it.

A verdict is what the guest sees of an attack:

* ``broken``: NEEDS_RESET, one configuration interrupt if DRIVER_OK was set, no used buffer and no other interrupt;
* ``accepted``: used with all that was asked for;
* ``completed0``: used, with nothing written;
* ``ignored``: nothing happens, and a request in the same session is answered;
* ``refused``: what was written is not taken over.

Which rule it was only the server says, in its log. Every case ends with a reset and a request that must be answered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, Literal, TypeAlias

from virtio_test.spec.status import Status
from virtio_test.spec.testdevice import RESPONSE

from tests.kernel.attack.driver import (
    AVAIL,
    CONFIG_VECTOR,
    NEXT,
    QUEUE_VECTOR,
    USED,
    Queue,
    answer,
    kick,
    mark,
    probe,
    probed,
    reset,
)
from tests.kernel.attack.program import ANY_VECTOR, Program, Results, Value

__all__ = [
    "FIRST_MARK",
    "NUMBER",
    "Case",
    "Chain",
    "Machine",
    "Needs",
    "Policy",
    "Steps",
    "Verdict",
    "Writes",
    "chain",
    "registers",
    "ring",
    "verdict",
]

Policy: TypeAlias = Literal["interop", "strict"]
Steps: TypeAlias = "Callable[[Program, Machine], object]"
"""Adds steps to a program, for a machine."""

Verdict: TypeAlias = Literal["broken", "accepted", "completed0", "ignored", "refused"]

_QUEUE: Final = Queue()
FIRST_MARK: Final = 0x1000
NUMBER: Final = 100
"""What the request of an attack asks for."""


@dataclass(frozen=True)
class Machine:
    """What an attack must know of a guest.

    Attributes:
        name: of the guest.
        low: whether there is memory at address 0.
        end: where its memory ends; None where only the guest knows.
        rom: an address that the device may only read, or None.
        relocates: whether an address written to a BAR moves it for the guest.
        keeps_table: whether MSI-X table and pending bits are the machine's, and not the function's.
        line: whether there is an interrupt line.
        late: whether the device keeps what it is asked for until it is told to answer (`late`).
        silent: whether the registers are another's and only the rings are ours, so that nobody says NEEDS_RESET.
        own_bar: whether BAR 4 holds the registers.
    """

    name: str
    low: bool = False
    end: int | None = None
    rom: int | None = None
    relocates: bool = False
    keeps_table: bool = False
    line: bool = False
    late: bool = False
    silent: bool = False
    own_bar: bool = True

    def can(self, case: Case) -> bool:
        """Whether a case can be done here; what is for a late device can be done with nothing else."""
        if self.late:
            return case.needs == "late"
        if self.silent and not case.by_rings:
            return False
        return case.needs is None or getattr(self, case.needs) not in (None, False)


Needs: TypeAlias = Literal["low", "rom", "relocates", "line", "late", "own_bar"]
"""A fact of `Machine` that must be there."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One attack.

    Attributes:
        rows: of the robustness catalogue, and CVEs.
        name: short, without blanks.
        packed: the ring's format, also of the request after it.
        run: adds its steps; the guest is a machine's.
        judge: what came of it, from the results: a verdict, or what does not fit one.
        verdict: what must come of it.
        rules: the rules that the server names, in order, each once.
        strict: verdict and rules under `Policy.strict` where they differ.
        needs: what a machine must have for it.
        by_rings: whether a running ring alone is broken by it.
    """

    rows: tuple[str, ...]
    name: str
    packed: bool = False
    run: Steps
    judge: Callable[[Results], str]
    verdict: Verdict
    rules: tuple[str, ...] = ()
    strict: tuple[Verdict, tuple[str, ...]] | None = None
    needs: Needs | None = None
    by_rings: bool = False

    @property
    def by_line(self) -> bool:
        """Whether the function interrupts by its line instead of messages."""
        return self.needs == "line"

    @property
    def id(self) -> str:
        """Its name with the format."""
        return f"{self.name}-{'packed' if self.packed else 'split'}"

    def expected(self, policy: Policy) -> tuple[Verdict, tuple[str, ...]]:
        """Verdict and rules."""
        return self.strict if policy == "strict" and self.strict is not None else (self.verdict, self.rules)

    def program(self, number: int, machine: Machine) -> Program:
        """All of its steps, as attack `number`."""
        p = Program(f"{number}", end=machine.end)
        if not machine.silent:
            mark(p, FIRST_MARK + number)
        self.run(p, machine)
        reset(p, "end")
        probe(p, number % 100, packed=self.packed, late=machine.late)
        return p

    def outcome(self, number: int, results: Results) -> str:
        """The verdict, or what is wrong."""
        if results.get("looked", 0) == 0xFFFF:
            return "the device did not look at its new queue"
        return probed(results, number % 100) or self.judge(results)


# --- attacks on rings ---------------------------------------------------------------------------------------

Chain: TypeAlias = tuple[Value, int, int]
"""Address, length and flags of a descriptor."""

Writes: TypeAlias = Callable[[Program, Queue, Machine], object]


def chain(*links: Chain) -> Writes:
    """Writes one chain from descriptor 0 on, and makes it available."""

    def write(p: Program, queue: Queue, _: Machine) -> None:
        # Backwards: the head of a packed list is what makes it available.
        for index, (address, length, flags) in reversed(list(enumerate(links))):
            queue.desc(p, index, address, length, flags, index + 1 if not queue.packed and flags & NEXT else 0)
        queue.publish(p, 0)

    return write


def ring(
    rows: str,
    name: str,
    writes: Writes,
    *,
    outcome: Verdict = "broken",
    rules: str = "",
    strict: tuple[Verdict, str] | None = None,
    formats: str = "split packed",
    queue: Queue = _QUEUE,
    chains: int = 1,
    before: int = 0,
    slot: int | None = None,
    answered: bool = False,
    needs: Needs | None = None,
    told: bool = True,
) -> list[Case]:
    """An attack by a ring, in each of its formats: written, kicked once, and seen for what comes of it.

    Args:
        rows: ids, with blanks between.
        name: of the attack.
        writes: what is written.
        outcome: what must come of it.
        rules: that the server names.
        strict: verdict and rules under `Policy.strict`, where they differ.
        formats: of the ring.
        queue: how it is set up.
        chains: how many are used when it is not broken.
        before: how many of them are used although it is broken.
        slot: where the last one's used descriptor lies in a packed ring; at 0 when None.
        answered: whether the response to `driver.request(100)` must be there.
        needs: see `Case`.
        told: whether DRIVER_OK was set before it broke, so that a configuration interrupt says so.
    """

    def make(packed: bool) -> Case:
        mine = replace(queue, packed=packed)

        def run(p: Program, machine: Machine) -> None:
            mine.start(p, settled=told)
            writes(p, mine, machine)
            if machine.silent:
                # It looks, and stops before it would say again that it wants kicks.
                mine.put(p, mine.says, 0, 0xFFFF)
                kick(p)
                p.wait("kicks", mine.layout.at(mine.says), 2, 1)
            else:
                kick(p)
                p.interrupts("any", ANY_VECTOR, int(told))
            _look(p, mine, chains, slot or 0)
            if answered:
                mine.answered(p)

        return Case(
            rows=tuple(rows.split()),
            name=name,
            packed=packed,
            run=run,
            judge=lambda results: _of_ring(results, mine, chains, before, answered=answered, told=told),
            verdict=outcome,
            rules=tuple(rules.split()),
            strict=None if strict is None else (strict[0], tuple(strict[1].split())),
            needs=needs,
            by_rings=told and outcome == "broken",
        )

    return [make(each == "packed") for each in formats.split()]


def _look(p: Program, queue: Queue, chains: int, slot: int) -> None:
    """Bring back what there is to be seen, without waiting."""
    layout = queue.layout
    p.read("status", "device_status")
    if queue.packed:
        p.get("used", layout.at("desc.flags", slot), 2)
        p.get("len", layout.at("desc.len", slot), 4)
    else:
        p.get("used", layout.at("used.idx"), 2)
        p.get("len", layout.at("used.ring.len", (chains - 1) % queue.size), 4)
    p.interrupts("config", CONFIG_VECTOR)
    p.interrupts("queue", QUEUE_VECTOR)


def _of_ring(results: Results, queue: Queue, chains: int, before: int, *, answered: bool, told: bool) -> str:
    """The verdict of `ring`."""
    used = results["used"]
    if queue.packed:
        # A used descriptor has both bits; only how many came is the split ring's to say.
        used = chains if used & (AVAIL | USED) == AVAIL | USED else 0
    facts = {**results, "used": used, "queue": min(results["queue"], 1)}
    if results.get("kicks") == 1:
        return verdict("broken", facts, {"status": 15, "config": 0, "used": before, "queue": 0})
    if results["status"] & Status.DEVICE_NEEDS_RESET:
        return verdict("broken", facts, {"config": int(told), "used": before, "queue": 0})
    length = results["len"]
    wanted = {"status": 15, "config": 0, "used": chains, "queue": 1, "len": length and RESPONSE.size}
    if answered:
        wanted["low"], wanted["high"] = answer(NUMBER)
    return verdict("completed0" if length == 0 else "accepted", facts, wanted)


def verdict(name: str, results: Results, wanted: Mapping[str, int]) -> str:
    """A verdict, with what is not as it is wanted."""
    wrong = [
        f"{label} {results[label]:#x} instead of {value:#x}"
        for label, value in wanted.items()
        if results[label] != value
    ]
    return f"{name}, but {', '.join(wrong)}" if wrong else name


# --- attacks on registers -----------------------------------------------------------------------------------


def registers(
    rows: str,
    name: str,
    run: Steps,
    *,
    outcome: Verdict = "ignored",
    rules: str = "",
    reads: Mapping[str, int] = MappingProxyType({}),
    queue: Queue = _QUEUE,
    when: Literal["fresh", "agreed", "running"] = "running",
    position: int = 0,
    needs: Needs | None = None,
) -> Case:
    """An attack by registers, after which a request in the same session is answered.

    Args:
        rows: ids, with blanks between.
        name: of the attack.
        run: adds its steps.
        outcome: the verdict when `reads` hold.
        rules: that the server names.
        reads: what must come back of the steps.
        queue: how it is set up.
        when: after a reset, once features are agreed on, or with the queue running.
        position: how many requests `run` makes itself.
        needs: see `Case`.
    """

    def steps(p: Program, machine: Machine) -> None:
        if when == "fresh":
            run(p, machine)
        queue.negotiate(p)
        if when == "agreed":
            run(p, machine)
        queue.run(p)
        if when == "running":
            run(p, machine)
        queue.ask(p, NUMBER, position=position)
        queue.used(p, position=position, label="live.")
        queue.answered(p, position=position, label="live.")
        p.interrupts("live.queue", QUEUE_VECTOR, 1)
        p.interrupts("live.config", CONFIG_VECTOR)
        p.read("live.status", "device_status")

    def judge(results: Results) -> str:
        low, high = answer(NUMBER)
        wanted = {"live.low": low, "live.high": high, "live.len": RESPONSE.size, "live.config": 0, "live.status": 15}
        return verdict(outcome, results, {**wanted, **reads})

    return Case(
        rows=tuple(rows.split()),
        name=name,
        packed=queue.packed,
        run=steps,
        judge=judge,
        verdict=outcome,
        rules=tuple(rules.split()),
        needs=needs,
    )
