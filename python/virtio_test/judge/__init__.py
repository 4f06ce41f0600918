"""Other people's devices before the same hostile programs that ours have to survive.

Each case of the catalogue is put to a process of its own, which then has to answer a good request. `judge` says of each
what became of the service: it survives, refuses, ignores, hangs or dies.
"""

from __future__ import annotations

from .run import AGAIN, PATIENCE, Case, chosen, judge
from .table import as_json, as_lines, as_markdown
from .target import TARGETS, Target, named
from .verdict import BAD, Observation, Result, Verdict

__all__ = [
    "AGAIN",
    "BAD",
    "PATIENCE",
    "TARGETS",
    "Case",
    "Observation",
    "Result",
    "Target",
    "Verdict",
    "as_json",
    "as_lines",
    "as_markdown",
    "chosen",
    "judge",
    "named",
]
