"""What a row of the robustness catalogue is here: a legal ring, one change, and what must come of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from virtio_test._core import DeviceQueue, DriverQueue, Policy

from tests.property.bench import Bench
from tests.property.ends import INDIRECT_DESC

Step = Callable[[Bench], object]


class Outcome(NamedTuple):
    """How many chains are handed out, and which rule is found broken behind them; None when all is accepted."""

    chains: int
    rule: str | None


class Outcomes(NamedTuple):
    """The outcome under each policy."""

    interop: Outcome
    strict: Outcome


def accepted(chains: int = 1) -> Outcomes:
    return Outcomes(Outcome(chains, None), Outcome(chains, None))


def broken(rule: str, *, after: int = 0) -> Outcomes:
    return Outcomes(Outcome(after, rule), Outcome(after, rule))


def only_strict(rule: str, *, after: int = 0, interop: int = 1) -> Outcomes:
    """Interop hands out `interop` chains; strict finds the rule broken after `after` of them."""
    return Outcomes(Outcome(interop, None), Outcome(after, rule))


@dataclass(frozen=True, kw_only=True)
class Where:
    """The queue of a case, where it is not the usual one."""

    packed: bool = False
    size: int = 8
    start: int = -1
    features: int = INDIRECT_DESC
    indirect_remainder: bool | None = None
    mixed_order: bool | None = None
    max_indirect: int | None = None

    def bench(self, base: Policy) -> Bench:
        policy = Policy(
            "strict" if base == Policy.strict else "interop",
            indirect_remainder=self.indirect_remainder,
            mixed_order=self.mixed_order,
            max_indirect=self.max_indirect,
            indirect_beyond_queue=True if self.max_indirect else None,
        )
        return Bench(self.packed, policy=policy, size=self.size, start=self.start, features=self.features)


@dataclass(frozen=True)
class Defect:
    """A legal ring (`shape`), one `change` of it, and what follows; `check` looks at what was accepted."""

    row: str
    title: str
    shape: Step
    change: Step
    outcomes: Outcomes
    where: Where = Where()
    check: Callable[[Bench], None] | None = None

    def __str__(self) -> str:
        ring = "packed" if self.where.packed else "split"
        return f"{self.row}-{ring}-{self.title}".replace(" ", "_")


@dataclass(frozen=True)
class Refused:
    """A configuration, or a state, that never becomes a queue, for each of the `ends`; which rule says so."""

    row: str
    title: str
    rule: str
    changes: dict[str, int]
    packed: bool = False
    state: tuple[int, int] | None = None
    ends: tuple[type[DeviceQueue | DriverQueue], ...] = (DeviceQueue, DriverQueue)

    def __str__(self) -> str:
        return f"{self.row}-{'packed' if self.packed else 'split'}-{self.title}".replace(" ", "_")


# ------------------------------------------------------------------------------------------------------------ the pen


def put(name: str, value: int, index: int = 0) -> Step:
    """One field of the ring."""
    return lambda bench: bench.put(name, value, index)


def entry(name: str, value: int, index: int = 0) -> Step:
    """One field of the indirect table."""
    return lambda bench: bench.entry(name, value, index)


def flag(bits: int, index: int = 0) -> Step:
    return lambda bench: bench.put("desc.flags", bench.get("desc.flags", index) | bits, index)


def unflag(bits: int, index: int = 0) -> Step:
    return lambda bench: bench.put("desc.flags", bench.get("desc.flags", index) & ~bits, index)


def every(*steps: Step) -> Step:
    """One after another."""

    def run(bench: Bench) -> None:
        for step in steps:
            step(bench)

    return run


def buffer(index: int, address: int, length: int) -> Step:
    """Where a descriptor points."""
    return every(put("desc.addr", address, index), put("desc.len", length, index))


def segments(*wanted: tuple[int, int, bool]) -> Callable[[Bench], None]:
    """A check: the first chain has exactly these."""

    def check(bench: Bench) -> None:
        assert bench.popped[0].segments == list(wanted)

    return check


def nothing(_bench: Bench) -> None:
    """No change: the legal ring itself is the case."""
