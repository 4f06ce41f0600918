"""``virtio-test serve``: a device as a vhost-user back-end, until interrupted."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal

from virtio_test._core import Policy
from virtio_test.console import print_line
from virtio_test.devices.test import TestDevice
from virtio_test.errors import InvalidArgument
from virtio_test.features import FeatureSet
from virtio_test.transport.vhost_user.backend import Backend
from virtio_test.transport.vhost_user.backend import serve as serve_device

__all__ = ["serve"]

_log: Final = logging.getLogger("virtio_test.cli")


def serve(
    path: Path | None = None,
    *,
    fd: int | None = None,
    device: str = "test",
    timer: bool = False,
    first_after: float = 30.0,
    every: float = 1.0,
    features: str | None = None,
    policy: Literal["interop", "strict"] = "interop",
    show: Callable[[str], object] = print_line,
) -> None:
    """Serve the device until SIGINT or SIGTERM; its console is `show`, what happens to connections goes to stderr.

    Args:
        path: UNIX socket to listen on; or
        fd: one that the launcher gave.
        device: which device; there is ``test``.
        timer: its timer variant.
        first_after: seconds from now to its first tick.
        every: seconds between ticks.
        features: changes to what is offered, as `FeatureSet.parse` reads them.
        policy: tolerances towards the driver.
        show: takes each line of the device's console.

    Raises:
        InvalidArgument: a socket that cannot be used, an unknown device or feature, an impossible offer.
    """
    if device != "test":
        raise InvalidArgument(f"unknown device {device!r}; there is: test")
    made = TestDevice(timer=timer, first_after=first_after, every=every, console=_Console(show))
    offered = made.features if features is None else FeatureSet.parse(features, base=made.features)
    _log_to_stderr()

    def ready(_backend: Backend) -> None:
        where = path if path is not None else f"fd {fd}"
        sys.stderr.write(f"virtio-test: serving the {device} device on {where}, Ctrl-C or SIGTERM stops it\n")
        sys.stderr.flush()

    policies = {"interop": Policy.interop, "strict": Policy.strict}
    serve_device(made, path, fd=fd, features=offered, policy=policies[policy], ready=ready)


class _Console:
    """The device's console: when its reader leaves, the device goes on without one."""

    def __init__(self, show: Callable[[str], object]) -> None:
        self._show: Callable[[str], object] | None = show

    def __call__(self, line: str) -> None:
        if self._show is None:
            return
        try:
            self._show(line)
        except OSError as error:
            self._show = None
            _log.warning("nobody reads the device's console any more: %s", error.strerror)


def _log_to_stderr() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("virtio-test: %(levelname)s: %(message)s"))
    logger = logging.getLogger("virtio_test")
    if not logger.handlers:
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
