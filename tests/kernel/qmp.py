"""QEMU's monitor, as far as a migration needs it."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self, cast

from tests.kernel.console import STEP_SECONDS, GuestError


class Monitor:
    """A connection to the monitor at ``path``; a context manager that closes it."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(STEP_SECONDS)
        deadline = time.monotonic() + STEP_SECONDS
        while self._socket.connect_ex(str(path)):
            if time.monotonic() > deadline:
                raise GuestError(f"QEMU does not listen at {path}")
            time.sleep(0.02)
        self._lines = self._socket.makefile("r", encoding="utf-8")
        self._next()
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: object) -> dict[str, object]:
        """What QEMU answers to one command.

        Raises:
            GuestError: that it cannot do it.
        """
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while True:
            answer = self._next()
            if "error" in answer:
                raise GuestError(f"{command}: {answer['error']}")
            if "return" in answer:
                return cast("dict[str, object]", answer["return"])

    def _next(self) -> dict[str, object]:
        line = self._lines.readline()
        if not line:
            raise GuestError("QEMU has closed its monitor")
        return json.loads(line)

    def migrate(self, path: Path, *, timeout: float = 2 * STEP_SECONDS) -> None:
        """Begins to write the running guest to a file; all of its memory is written once when this returns.

        From then on it is so slow that a guest that goes on writing is never done with.

        Raises:
            GuestError: it fails, or does not come that far in time.
        """
        self._bound(mib_per_second=64)
        self.ask("migrate", uri=f"file:{path}")
        self._wait(lambda state: _number(state, "remaining") < 8 << 20, "its first pass nearly done", timeout)
        self._bound(mib_per_second=4)
        self._wait(lambda state: _number(state, "dirty-sync-count") > 1, "its first pass done", timeout)

    @property
    def migrating(self) -> bool:
        """Whether a migration is under way, and the guest runs."""
        return self.ask("query-migrate").get("status") == "active" and self.ask("query-status")["running"] is True

    def wait_until_running(self, *, timeout: float = 2 * STEP_SECONDS) -> None:
        """Waits for a guest that is migrated to here to go on.

        Raises:
            GuestError: it does not in time.
        """
        deadline = time.monotonic() + timeout
        while (state := self.ask("query-status"))["running"] is not True:
            if time.monotonic() > deadline:
                raise GuestError(f"the guest does not go on: {state}")
            time.sleep(0.02)

    def finish(self, *, timeout: float = 2 * STEP_SECONDS) -> None:
        """Lets the migration end, as fast as it can.

        Raises:
            GuestError: it does not, or has failed.
        """
        self.ask("migrate-set-parameters", **{"max-bandwidth": 1 << 40, "downtime-limit": 60_000})
        self._wait(lambda state: state["status"] == "completed", "it done", timeout)

    def _bound(self, *, mib_per_second: int) -> None:
        self.ask("migrate-set-parameters", **{"max-bandwidth": mib_per_second << 20, "downtime-limit": 0})

    def _wait(self, reached: Callable[[dict[str, object]], bool], what: str, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not reached(state := self.ask("query-migrate")):
            if state["status"] in ("failed", "cancelled") or time.monotonic() > deadline:
                raise GuestError(f"the migration has not {what}: {state}")
            time.sleep(0.02)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()
        self._socket.close()


def _number(state: dict[str, object], name: str) -> int:
    """A number about the memory that is migrated; as large as can be before there is one."""
    memory = cast("dict[str, int]", state.get("ram", {}))
    return memory.get(name, 1 << 63 if name == "remaining" else 0)
