"""How far a long command is, on stderr, where that is a terminal and somebody waits."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

__all__ = ["Progress"]

_PATIENCE_SECONDS: Final = 0.5
_REFRESH_SECONDS: Final = 0.1


class Progress:
    """A bar that appears when the work lasts, and is gone when it ends.

    Args:
        what: the work, a word or two.
        total: how many steps it has.
    """

    def __init__(self, what: str, total: int) -> None:
        self._what = what
        self._total = total
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._next = time.monotonic() + _PATIENCE_SECONDS
        self._wanted = sys.stderr is not None and sys.stderr.isatty()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int) -> None:
        """So many steps are done."""
        now = time.monotonic()
        if not self._wanted or now < self._next:
            return
        self._next = now + _REFRESH_SECONDS
        if self._bar is None or self._task is None:
            from rich.console import Console
            from rich.progress import Progress as Bar

            self._bar = Bar(console=Console(file=sys.stderr), transient=True, auto_refresh=False)
            self._task = self._bar.add_task(self._what, total=self._total)
            self._bar.start()
        self._bar.update(self._task, completed=done, refresh=True)
