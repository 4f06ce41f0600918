"""``virtio-test info``: what is installed, what it can do, and what of this machine it can use."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from virtio_test._core import __version__, build_info, rules
from virtio_test.console import print_line
from virtio_test.device import RING_FEATURES

__all__ = ["facts", "info"]

_QEMU = ("qemu-system-x86_64", "qemu-system-aarch64")


def info(*, as_json: bool = False, show: Callable[[str], object] = print_line) -> str:
    """Show the facts as a table, or as one JSON object; returns what was shown."""
    found = facts()
    text = json.dumps(found, indent=2) if as_json else _table(found)
    show(text)
    return text


def facts() -> dict[str, dict[str, str]]:
    """What there is, by section and name. Under ``machine`` each value begins with ``yes`` or ``no``."""
    return {
        "versions": {
            "virtio-test": __version__,
            "python": f"{platform.python_implementation()} {platform.python_version()}",
            "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
            **{name: _version(name) for name in ("click", "rich", "numpy", "hypothesis")},
        },
        "core": {**build_info(), "rules": f"{len(rules())} checks, each with its clause of VIRTIO 1.4"},
        "features": {"ring": ", ".join(RING_FEATURES), "ring formats": "split, packed", "devices": "test"},
        "machine": {name: _answer(probe) for name, probe in _PROBES.items()},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _answer(probe: Callable[[], str]) -> str:
    try:
        detail = probe()
    except OSError as error:
        return f"no ({error.strerror or error})"
    return f"yes ({detail})" if detail else "yes"


def _memfd() -> str:
    os.close(os.memfd_create("virtio-test-info"))
    return "guest memory that another process can map"


def _eventfd() -> str:
    os.close(os.eventfd(0))
    return "kicks and calls"


def _unix_sockets() -> str:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as server:
        server.bind(str(Path(folder, "s")))
    return "vhost-user"


def _passing_fds() -> str:
    one, other = socket.socketpair()
    with one, other:
        fd = os.eventfd(0)
        try:
            socket.send_fds(one, [b"x"], [fd])
        finally:
            os.close(fd)
        _, fds, _, _ = socket.recv_fds(other, 1, 1)
        for each in fds:
            os.close(each)
    return "memory and notifiers of a front-end"


def _kvm() -> str:
    os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    return "guests at full speed"


def _qemu() -> str:
    path = next((found for name in _QEMU if (found := shutil.which(name))), None)
    if path is None:
        raise OSError(0, "not in PATH; the kernel tests fetch their own")
    try:
        # The program that the user's own PATH names, asked for its version only.
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True)  # noqa: S603
    except subprocess.SubprocessError as error:
        raise OSError(0, f"{path} does not tell its version: {error}") from None
    return f"{path}: {answer.stdout.splitlines()[0] if answer.stdout else 'no version'}"


_PROBES: dict[str, Callable[[], str]] = {
    "memfd": _memfd,
    "eventfd": _eventfd,
    "UNIX sockets": _unix_sockets,
    "passing fds": _passing_fds,
    "/dev/kvm": _kvm,
    "QEMU": _qemu,
}


def _table(found: dict[str, dict[str, str]]) -> str:
    from io import StringIO

    from rich.console import Console
    from rich.table import Table

    width = max(shutil.get_terminal_size((100, 24)).columns, 60)
    console = Console(file=StringIO(), width=width, highlight=False, no_color=True)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for section, values in found.items():
        for place, (name, value) in enumerate(values.items()):
            table.add_row(section if place == 0 else "", name, value)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
