"""What a driver does against the rules, as lines of the server's log.

Theory
------
A guest can break the same rule a million times a second, and must not fill a disk by it. So a rule makes one line
from one reset of the device to the next, and all of them together `MOST_LINES`; the bank counts the rest.
"""

from __future__ import annotations

import logging
from typing import Final

from .bank import RegisterBank

__all__ = ["MOST_LINES", "log_findings"]

_log: Final = logging.getLogger("virtio_test.driver")

MOST_LINES: Final = 10_000
"""Lines for one bank, for as long as it lives."""


def log_findings(bank: RegisterBank) -> None:
    """Log from now on what `bank`'s driver does against the rules, and what breaks its device.

    The lines go to the logger ``virtio_test.driver``, as warnings that begin with the rule.
    """
    findings = _Findings(bank)
    bank.on_note = findings.tell


class _Findings:
    """The rules that were told since the last reset."""

    def __init__(self, bank: RegisterBank) -> None:
        self._bank = bank
        self._resets = -1
        self._told: set[str] = set()
        self._left = MOST_LINES

    def tell(self, error: Exception) -> None:
        """One more finding."""
        if self._resets != self._bank.resets:
            self._resets = self._bank.resets
            self._told.clear()
        rule: str = getattr(error, "rule", type(error).__name__)
        if rule in self._told or not self._left:
            return
        self._told.add(rule)
        self._left -= 1
        _log.warning("the driver: %s", error)
        if not self._left:
            _log.warning("the driver: this was the last of %d lines, more is only counted", MOST_LINES)
