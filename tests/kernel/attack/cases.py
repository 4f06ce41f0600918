"""All attacks."""

from __future__ import annotations

from typing import Final

from tests.kernel.attack import buffers, functions, inflight, packed, queues, rings, states, tables
from tests.kernel.attack.case import Case

__all__ = ["CASES"]

CASES: Final[list[Case]] = [
    case for module in (rings, buffers, tables, packed, queues, states, functions, inflight) for case in module.CASES
]
