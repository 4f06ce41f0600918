"""What became of a back-end that was attacked, and how that is told.

Theory
------
Five words, from the best to the worst. They are about the *service*, not about politeness: after the attack a good
request must be answered, on the ring set up anew or on a new connection. Who gives up a broken ring and comes back
**survives**; so does who completes what is legal, or what real peers do. Who ends the connection, or refuses a message,
and takes the next **refuses**. Who completes a broken chain as if it were one **ignores**. Who lives and answers no
more, or burns a processor until somebody comes, **hangs**. Whose process has ended **dies**.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Final

__all__ = ["BAD", "Observation", "Result", "Verdict"]


class Verdict(StrEnum):
    """What a row did to a target; the value is the word in the table."""

    SURVIVES = "survives"
    REFUSES = "refuses"
    IGNORES = "ignores"
    HANGS = "hangs"
    DIES = "dies"


BAD: Final = frozenset({Verdict.HANGS, Verdict.DIES})
"""What is a finding."""


@dataclass(slots=True)
class Observation:
    """What was seen of one trial.

    Attributes:
        used: what the used ring said of the attack, in words; empty when nothing was completed.
        count: of how many buffers it said so.
        error: whether the target said that it gave up the queue (the err fd, or DEVICE_NEEDS_RESET).
        refused: the message that was refused, or at which the connection ended; empty when all were taken.
        healed: ``"same"`` when a good request was answered on the same connection, ``"new"`` when only a new one
            helped, empty when nothing did.
        spins: whether it burnt a processor while it had nothing to do, if it is one that sleeps then.
        death: how its process ended, in words; empty while it lives.
        legal: how many buffers it is right to complete; None when that is all of them.
    """

    used: str = ""
    count: int = 0
    error: bool = False
    refused: str = ""
    healed: str = ""
    spins: bool = False
    death: str = ""
    legal: int | None = 0

    @property
    def verdict(self) -> Verdict:
        """The worst that holds."""
        if self.death:
            return Verdict.DIES
        if not self.healed or self.spins:
            return Verdict.HANGS
        if self.refused:
            return Verdict.REFUSES
        return Verdict.IGNORES if self.legal is not None and self.count > self.legal else Verdict.SURVIVES

    @property
    def evidence(self) -> str:
        """One line for the table."""
        if self.death:
            return self.death
        told: list[str] = []
        if self.refused:
            told.append(self.refused)
        if self.used:
            told.append(self.used)
        if self.error:
            told.append("says that the queue is broken")
        if self.spins:
            told.append("spins")
        if not self.healed:
            told.append("answers no good request any more")
        elif self.healed == "new" and not self.refused:
            told.append("only a new connection helps")
        return "; ".join(told) or "nothing completed, serves on"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One row of the table.

    Attributes:
        target: who was judged.
        row: of the robustness catalogue.
        title: what was sent.
        ring: ``split``, ``packed``, or empty where no ring is meant.
        verdict: see `Verdict`.
        evidence: one line.
        steady: whether a second try said the same; a good verdict is not tried twice.
        ours: what `Policy.interop` makes of it.
        command: what repeats it.
    """

    target: str
    row: str
    title: str
    ring: str
    verdict: Verdict
    evidence: str
    steady: bool
    ours: str
    command: str

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self)
