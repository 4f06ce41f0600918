"""``virtio-test serve``: a device before a real guest, until interrupted."""

from __future__ import annotations

import logging
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final, Literal

from virtio_test._core import GuestMemory, Policy
from virtio_test.console import print_line
from virtio_test.errors import InvalidArgument
from virtio_test.features import FeatureSet
from virtio_test.loop import OwnerLoop

from .devices import Choice, make
from .machine import Flavour

__all__ = ["serve"]

_log: Final = logging.getLogger("virtio_test.cli")
_PATIENCE_SECONDS: Final = 1.0
"""How long one line of the console may wait for a reader that does not read; the lines after it do not wait."""
_LINES: Final = 2000
_LINES_PER_SECOND: Final = 20


def serve(
    choice: Choice,
    path: Path | None = None,
    *,
    fd: int | None = None,
    transport: Literal["vhost-user", "pci"] = "vhost-user",
    carrier: Literal["vfio-user", "uml"] | None = None,
    flavour: Flavour | None = None,
    express: bool = False,
    features: str | None = None,
    policy: Literal["interop", "strict"] = "interop",
    show: Callable[[str], object] = print_line,
) -> None:
    """Serve a device until SIGINT or SIGTERM; its console is `show`, what happens to connections goes to stderr.

    Args:
        choice: the device.
        path: UNIX socket to listen on; or
        fd: one that the launcher gave.
        transport: ``vhost-user`` for its rings alone, ``pci`` for a whole PCI function.
        carrier: who brings the function to a guest; ``vfio-user`` when None.
        flavour: of the function; ``generic`` when None.
        express: the function sits behind a PCI Express port.
        features: changes to what is offered, as `FeatureSet.parse` reads them.
        policy: tolerances towards the driver.
        show: takes each line of the device's console.

    Raises:
        InvalidArgument: a socket that cannot be used, an unknown device or feature, an impossible offer, or an option
            of another transport.
        OSError: a file that cannot be opened.
    """
    if transport != "pci" and (carrier is not None or flavour is not None or express):
        raise InvalidArgument("--carrier, --flavour and --express are for --transport pci")
    device = make(choice, console=_Console(show))
    offered = device.features if features is None else FeatureSet.parse(features, base=device.features)
    rules = {"interop": Policy.interop, "strict": Policy.strict}[policy]
    _log_to_stderr()

    # Not through the log, which the caller may have turned down: this is what a launcher waits for.
    def ready(_server: object) -> None:
        where = path if path is not None else f"fd {fd}"
        _tell(f"virtio-test: serving the {choice.device} device on {where}, Ctrl-C or SIGTERM stops it\n")

    if transport == "vhost-user":
        from virtio_test.transport.vhost_user.backend import serve as serve_device

        serve_device(device, path, fd=fd, features=offered, policy=rules, ready=ready)
        return
    from virtio_test.transport.findings import log_findings
    from virtio_test.transport.pci.function import VirtioPci

    def function(loop: OwnerLoop, memory: GuestMemory) -> VirtioPci:
        made = VirtioPci(
            device,
            flavour=flavour or "generic",
            behind_express_port=express,
            loop=loop,
            memory=memory,
            offered=offered,
            policy=rules,
        )
        log_findings(made.bank)
        return made

    if carrier == "uml":
        from virtio_test.carrier.uml import serve_uml

        serve_uml(function, path, fd=fd, ready=ready)
    else:
        from virtio_test.carrier.vfio_user.server import serve as serve_function

        serve_function(function(OwnerLoop(), GuestMemory()), path, fd=fd, ready=ready)


class _Console:
    """The device's console: when its reader leaves, or reads no more, the device goes on without one.

    A guest, a front-end and a signal that is to stop us must not wait for somebody who has paused our output.
    """

    def __init__(self, show: Callable[[str], object]) -> None:
        self._show: Callable[[str], object] | None = show
        self._lost = 0

    def __call__(self, line: str) -> None:
        if self._show is None:
            return
        if not _writable(sys.stdout, 0.0 if self._lost else _PATIENCE_SECONDS):
            if not self._lost:
                _log.warning("nobody reads the device's console; its lines are dropped until somebody does")
            self._lost += 1
            return
        if self._lost:
            _log.warning("%d lines of the device's console were dropped", self._lost)
            self._lost = 0
        try:
            self._show(line)
        except OSError as error:
            self._show = None
            _log.warning("nobody reads the device's console any more: %s", error.strerror)


def _writable(stream: IO[str] | None, seconds: float) -> bool:
    """Whether a line can be written without waiting for a reader; wait for that no longer than `seconds`."""
    try:
        fd = -1 if stream is None else stream.fileno()
    except (OSError, ValueError):
        fd = -1
    if fd < 0:
        # A stream that is no file cannot be full, and who has none loses nothing.
        return True
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    end = time.monotonic() + seconds
    # In slices: a signal handler that runs in between does not end a longer wait.
    while not poll.poll(min(100.0, 1000 * seconds)):
        if time.monotonic() >= end:
            return False
    return True


def _tell(text: str) -> None:
    """Write to stderr, if it can be written; the server serves without it too."""
    if sys.stderr is not None and _writable(sys.stderr, 0.0):
        try:
            sys.stderr.write(text)
            sys.stderr.flush()
        except OSError:
            pass


class _Log(logging.Handler):
    """The log on stderr. A front-end that causes thousands of lines must not stop us by them when nobody reads.

    Nor may it fill a disk: after `_LINES` of them there are `_LINES_PER_SECOND`, and it is said how many are missing.
    """

    def __init__(self) -> None:
        super().__init__()
        self._room = float(_LINES)
        self._since = time.monotonic()
        self._missing = 0

    def emit(self, record: logging.LogRecord) -> None:
        """See `logging.Handler.emit`; lines for which there is no room are dropped."""
        now = time.monotonic()
        self._room = min(_LINES, self._room + _LINES_PER_SECOND * (now - self._since))
        self._since = now
        lines = self.format(record).splitlines(keepends=True)
        if self._room < 1.0:
            self._missing += len(lines)
            return
        if self._missing:
            _tell(f"virtio-test: {self._missing} lines of the log are missing: there were too many\n")
            self._missing = 0
        self._room -= len(lines)
        for line in lines:
            _tell(line if line.endswith("\n") else line + "\n")


def _log_to_stderr() -> None:
    handler = _Log()
    handler.setFormatter(logging.Formatter("virtio-test: %(levelname)s: %(message)s"))
    logger = logging.getLogger("virtio_test")
    if not logger.handlers:
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
