"""The command ``virtio-test``.

Exit status: 0 fine, 1 the other side did something wrong, 2 we were misused, 130 interrupted. Whatever is wrong is
one line on stderr: what, where, and what to do about it; never a traceback. Every command is also a function that
returns what it prints.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with `arguments` (those of the process, when None); the exit status."""
    # Loaded here and not above: `import virtio_test` must not pay for it, and an interrupt while it loads is ours.
    try:
        from .app import run

        return run(list(sys.argv[1:] if arguments is None else arguments))
    except KeyboardInterrupt:
        return 130
