"""The consoles of device and driver: where their lines go, and how numbers and strange values get into one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias

__all__ = ["Console", "print_line", "shown", "signed"]

_MOST: Final = 60

Console: TypeAlias = Callable[[str], object]
"""Takes one line without its end."""


def print_line(line: str) -> None:
    """The default console: standard output, flushed after each line."""
    print(line, flush=True)  # noqa: T201 - a console prints


def signed(value: int) -> int:
    """A number of 32 bits as C's ``%d`` shows it."""
    return value - (1 << 32) if value & 0x8000_0000 else value


def shown(value: object) -> str:
    """`value` as a part of a line, whoever it comes from: its `repr` as far as 60 characters go."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        # A number of more digits than Python writes, or what lies too deep in itself.
        text = f"<{type(value).__name__}>"
    return text if len(text) <= _MOST else f"{text[: _MOST - 3]}..."
