"""What one row of the robustness catalogue is: what the other side does, who meets it, and what comes of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from virtio_test.checks.catalogue import CATALOGUE
from virtio_test.checks.entry import Entry, Outcome, clause_text

from .practice import PRACTICE

__all__ = ["Meets", "Row", "apart", "row"]


class Meets(StrEnum):
    """Whose business a row is; the value says it."""

    DEVICE = "device end"
    DRIVER = "driver end"
    CLASS = "device class"
    TRANSPORT = "transport"
    PROTOCOL = "protocol"
    CALLER = "our own caller"
    NOBODY = "nobody here"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row.

    Attributes:
        id: stable: of the catalogue (``"A05"``), of a vulnerability, or of a project's issue or commit.
        also: further ids of the same; each finds this row.
        stimulus: what happens, in one sentence.
        meets: who meets it.
        rules: names of `CATALOGUE` that can be raised for it; empty where it is behaviour alone.
        behaviour: what is done beyond raising; empty where the rules say all.
        practice: what implementations do with it, where its rules do not tell; empty where nothing is known.
        clauses: clauses of VIRTIO 1.4, or sections of a protocol's document.
        interop: what follows under `Policy.interop`.
        strict: what follows under `Policy.strict`.
        peer: who makes a tolerance of interop necessary; empty where both policies agree.
        differs: where what follows is not what the catalogue recommends, and why; empty where it is.
        rows: other rows with the same mechanism.
        reason: why it does not apply; empty where it does.
    """

    id: str
    also: tuple[str, ...] = ()
    stimulus: str
    meets: Meets
    rules: tuple[str, ...] = ()
    behaviour: str = ""
    practice: str = ""
    clauses: tuple[str, ...] = ()
    interop: Outcome
    strict: Outcome
    peer: str = ""
    differs: str = ""
    rows: tuple[str, ...] = ()
    reason: str = ""

    @property
    def ids(self) -> tuple[str, ...]:
        """Every id that finds it."""
        return (self.id, *self.also)

    @property
    def demands(self) -> dict[str, str]:
        """What each clause of VIRTIO 1.4 says, in our words; sections of a protocol's document are not ours."""
        return {each: clause_text(each) for each in self.clauses if each[0].isdigit()}

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "id": self.id,
            "also": list(self.also),
            "stimulus": self.stimulus,
            "meets": str(self.meets),
            "rules": list(self.rules),
            "behaviour": self.behaviour,
            "practice": self.practice,
            "clauses": list(self.clauses),
            "demands": self.demands,
            "interop": str(self.interop),
            "strict": str(self.strict),
            "peer": self.peer,
            "differs": self.differs,
            "rows": list(self.rows),
            "reason": self.reason,
        }


def row(
    ids: str,
    meets: Meets,
    stimulus: str,
    does: Outcome | tuple[Outcome, Outcome] | None = None,
    behaviour: str = "",
    *,
    by: str = "",
    clauses: str = "",
    peer: str = "",
    differs: str = "",
    like: str = "",
) -> Row:
    """A row of words.

    Args:
        ids: the id, and what else it is called.
        meets: who meets it.
        stimulus: what happens.
        does: the outcome, or those of interop and of strict; that of the first rule of `by` if None.
        behaviour: what is done beyond raising.
        by: rules, the one that decides first.
        clauses: clauses; those of the rules if empty.
        peer: who needs the tolerance; as the deciding rule says if empty.
        differs: where and why this is not what the catalogue recommends.
        like: rows with the same mechanism.
    """
    first, *more = ids.split()
    decides = _decides(by.split(), meets)
    if does is None:
        assert decides is not None, f"{ids}: neither an outcome nor a rule"
        interop, strict = decides.interop, decides.strict
        peer = peer or decides.peer
    else:
        interop, strict = does if isinstance(does, tuple) else (does, does)
    return Row(
        id=first,
        also=tuple(more),
        stimulus=stimulus,
        meets=meets,
        rules=tuple(by.split()),
        behaviour=behaviour,
        practice=PRACTICE.get(first, ""),
        clauses=tuple(clauses.split()) or _clauses(by.split(), meets),
        interop=interop,
        strict=strict,
        peer=peer,
        differs=differs,
        rows=tuple(like.split()),
    )


def apart(ids: str, stimulus: str, reason: str) -> Row:
    """A row that does not apply, and why."""
    first, *more = ids.split()
    return Row(
        id=first,
        also=tuple(more),
        stimulus=stimulus,
        meets=Meets.NOBODY,
        interop=Outcome.APART,
        strict=Outcome.APART,
        reason=reason,
    )


_PROTOCOL: Final = "vhost-user"


def _entry(name: str, meets: Meets) -> Entry:
    """Where two families use one name, a row of a protocol means that of the protocol."""
    found = CATALOGUE[name]
    return next((each for each in found if (each.family == _PROTOCOL) == (meets is Meets.PROTOCOL)), found[0])


def _decides(names: Iterable[str], meets: Meets) -> Entry | None:
    return next((_entry(name, meets) for name in names), None)


def _clauses(names: Iterable[str], meets: Meets) -> tuple[str, ...]:
    found = (_entry(name, meets) for name in names)
    told = (
        f"{each.family}: {clause}" if each.family != "virtio" else clause for each in found for clause in each.clauses
    )
    return tuple(dict.fromkeys(told))
