"""What tests of sockets, fds and threads share: counting what is held, waiting for what comes, a server in a thread."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from virtio_test.sockets.server import PeerServer

PATIENCE = 10.0


def a_fd() -> int:
    return os.open("/dev/null", os.O_RDONLY)


def open_fds() -> int:
    # What earlier tests left to the collector would be counted now and gone the next time.
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


def mapped_files() -> int:
    """Mappings of shared files: guest memory, ours and the other side's."""
    gc.collect()
    return Path("/proc/self/maps").read_text().count("/memfd:")


def eventually(holds: Callable[[], bool], *, patience: float = PATIENCE) -> bool:
    """Whether `holds` becomes true in time."""
    end = time.monotonic() + patience
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


class ServerThread:
    """A server whose loop runs in a thread."""

    def __init__(self, path: Path, server: PeerServer) -> None:
        self.path = path
        self.loop = server.loop
        self.failure: BaseException | None = None
        self._server = server
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.loop.run()
        except BaseException as error:  # noqa: BLE001 - raised again where the test ends
            self.failure = error

    def settle(self) -> None:
        """Wait until its loop has left what it is in: what that held is let go of then."""
        left = threading.Event()
        self.loop.call_soon(left.set)
        assert left.wait(PATIENCE)

    def close(self) -> None:
        self.loop.stop()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        self._server.close()
        if self.failure is not None:
            raise self.failure
