"""Section 2.12: saved state, and the record of what is in flight."""

from __future__ import annotations

from typing import Final

from virtio_test.checks.entry import Outcome

from .row import Meets, row

__all__ = ["STATE_ROWS"]

_OURS: Final = Meets.CALLER
_SAVED: Final = "`SavedStateError`, and the device is as it was."

STATE_ROWS: Final = (
    row("R01", _OURS, "A saved queue has an impossible size.", Outcome.MISUSE, _SAVED, clauses="2.7 2.8"),
    row(
        "R02",
        _OURS,
        "Saved indices say that more is in flight than the queue has.",
        Outcome.MISUSE,
        _SAVED,
        by="StateOutOfRange",
    ),
    row(
        "R03",
        Meets.DEVICE,
        "The ring in memory does not fit the saved indices.",
        by="AvailIdxTooFar",
        behaviour="The state itself is right, so it is the ring that is broken, once it is looked at.",
    ),
    row("R04", _OURS, "A saved state has more queues than the device.", Outcome.MISUSE, _SAVED, clauses="2.6"),
    row(
        "R06",
        _OURS,
        "A saved list of chains in flight names heads, or counts, that cannot be.",
        Outcome.MISUSE,
        f"{_SAVED} What is in flight is named by ring position and walked anew, so no list of segments is trusted.",
        clauses="2.7.6 2.8.1",
    ),
    row("R07", _OURS, "The saved configuration has another length.", Outcome.MISUSE, _SAVED, clauses="2.5"),
    row("R08", _OURS, "Saved features are not offered here.", Outcome.MISUSE, _SAVED, clauses="2.2.2"),
    row(
        "R09",
        _OURS,
        "Saved indices of a packed ring are beyond it, with any wrap bit.",
        Outcome.MISUSE,
        _SAVED,
        by="StateOutOfRange",
    ),
    row(
        "R10",
        _OURS,
        "A used buffer was stored and not yet notified when the state was saved.",
        Outcome.ACCEPTED,
        "It is notified after the restore, once too often rather than never.",
        clauses="2.7.7.2",
    ),
    row(
        "R11",
        Meets.PROTOCOL,
        "A record of what is in flight has indices, links, counters or sizes that cannot be.",
        by="InflightState InflightRegion",
    ),
    row(
        "R12",
        _OURS,
        "A state is restored twice, or is that of a broken device.",
        Outcome.ACCEPTED,
        "It is what it was, broken too.",
        clauses="2.1.2",
    ),
)
