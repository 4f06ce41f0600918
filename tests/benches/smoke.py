"""One quick round of a case: both sides did the work and agree on it, or `open` and the round raise. Never the time."""

from __future__ import annotations

from benches.runner import Case, Result, measure


def smoke(case: Case) -> Result:
    """Run it once; what was measured."""
    result = measure(case, rounds=1, quick=True)
    assert result.ours > 0
    assert result.peer > 0
    return result
