"""What is known of one rule: where it stands, what follows when it is broken, and what others do about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from virtio_test.spec.clauses import CLAUSES

__all__ = ["Entry", "Outcome", "clause_text", "table"]


class Outcome(StrEnum):
    """What virtio-test does when the rule is broken; the value is the sentence that says it."""

    ACCEPTED = "accepted"
    BROKEN = "raised once; the queue is latched until its reset, and the device needs a reset"
    LATCHED = "raised once; the driver's queue is latched until its reset"
    REFUSED = "refused: no such queue comes to be, and nothing is changed"
    IGNORED = "what was written has no effect; it is counted and kept as a finding"
    NOTED = "noted as a finding; what was written counts all the same"
    FINDING = "kept as a finding; what carried it has no effect and work goes on"
    UNUSED = "the structure is not used, and opening fails when a driver cannot do without it"
    RAISED = "raised to the caller; the driver end goes no further"
    FAILED = "the request fails with it"
    SHOWN = "told of a ring at rest (`virtio-test check`); a running queue ignores it"
    OURS = "not the other side's fault: the device gives up by its own decision, and needs a reset"
    ENDED = "the connection is ended"
    ANSWERED = "answered with an error; nothing is changed"
    JUDGED = "the message is answered with an error where the protocol has an answer for it, else the connection ends"
    UNREAD = "without effect: it is not looked at"
    SAFE = "survived: the other side may spoil its own ring or data, and nothing else"
    COMPLETED = "used with a length of 0 or the device's own error; work goes on"
    DROPPED = "dropped: nothing is written, nobody is notified"
    MISUSE = "raised to our own caller as a UsageError; guest memory is as it was"
    APART = "does not apply"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One rule of the catalogue.

    Attributes:
        name: its stable name, as errors carry it.
        family: ``"virtio"``, ``"vhost-user"``, ``"vfio-user"`` or ``"uml-pci"``: whose rule it is.
        clauses: clauses of VIRTIO 1.4, or sections of the protocol's document.
        summary: what must hold, in one line.
        interop: what follows under `Policy.interop`.
        strict: what follows under `Policy.strict`.
        practice: what implementations do with it; empty where nothing is known.
        peer: who makes the tolerance of interop necessary; empty where both policies agree.
        rows: rows of the robustness catalogue.
    """

    name: str
    family: str
    clauses: tuple[str, ...]
    summary: str
    interop: Outcome
    strict: Outcome
    practice: str = ""
    peer: str = ""
    rows: tuple[str, ...] = ()

    @property
    def demands(self) -> dict[str, str]:
        """What each clause says, in our words; empty for the rules of a protocol, whose document is not ours."""
        return {clause: clause_text(clause) for clause in self.clauses} if self.family == _VIRTIO else {}


def clause_text(number: str) -> str:
    """What a clause of VIRTIO 1.4 says, or the nearest one that it is a part of."""
    while number not in CLAUSES:
        number, dot, _ = number.rpartition(".")
        if not dot:
            raise KeyError(number)
    return CLAUSES[number]


_VIRTIO: Final = "virtio"


def table(outcome: Outcome, lines: Iterable[tuple[str, str, str, str]]) -> tuple[Entry, ...]:
    """Entries with one outcome under both policies: lines of (name, clauses, rows, summary)."""
    return tuple(
        Entry(
            name=name,
            family=_VIRTIO,
            clauses=tuple(clauses.split()),
            rows=tuple(rows.split()),
            summary=summary,
            interop=outcome,
            strict=outcome,
        )
        for name, clauses, rows, summary in lines
    )
