"""The consoles of device and driver: where their lines go, and how C prints a number."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

__all__ = ["Console", "print_line", "signed"]

Console: TypeAlias = Callable[[str], object]
"""Takes one line without its end."""


def print_line(line: str) -> None:
    """The default console: standard output, flushed after each line."""
    print(line, flush=True)  # noqa: T201 - a console prints


def signed(value: int) -> int:
    """A number of 32 bits as C's ``%d`` shows it."""
    return value - (1 << 32) if value & 0x8000_0000 else value
