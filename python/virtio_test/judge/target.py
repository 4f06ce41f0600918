"""What can be judged: how each target is started, what it serves, and a request that it must answer."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal

from virtio_test.errors import InvalidArgument
from virtio_test.spec.blk import RequestStatus, RequestType

__all__ = ["IMAGE_BYTES", "TARGETS", "Request", "Target", "named"]

IMAGE_BYTES: Final = 4 << 20
_SERIAL_BYTES: Final = 20
_FRAME: Final = bytes(12) + bytes.fromhex("ffffffffffff 020000000001 88b5") + bytes(46)
_VERSION: Final = re.compile(r"\d+(\.\d+)+")
_VERSION_SECONDS: Final = 30.0


def _any(_answer: bytes) -> bool:
    return True


def _blk_right(answer: bytes) -> bool:
    return answer[-1] == RequestStatus.OK


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request that every device of a class answers.

    Attributes:
        readable: what it says.
        writable: bytes of its answer.
        right: whether an answer is right.
    """

    readable: bytes = b""
    writable: int = 0
    right: Callable[[bytes], bool] = _any


@dataclass(frozen=True, kw_only=True)
class Target:
    """One program that serves a device.

    Attributes:
        name: as it is asked for.
        what: one line for people.
        carrier: how it is reached.
        program: the words that start it.
        arguments: what follows them, of the folder with the socket ``s`` and the file ``image``.
        queues: how many it needs set up before it begins.
        attacked: which of them is attacked.
        good: a request that it must answer.
        asked: the words that ask for its version.
        up: what its log says once it is up; it listens before that.
        polls: it never sleeps, so a busy processor tells nothing.
    """

    name: str
    what: str
    carrier: Literal["vhost-user", "qtest"]
    program: tuple[str, ...]
    arguments: Callable[[Path], Sequence[str]]
    good: Request
    queues: int = 1
    attacked: int = 0
    asked: tuple[str, ...] = ("--version",)
    up: str = ""
    polls: bool = False

    def started_by(self, program: str | None) -> Target:
        """The same with another program, in a shell's words.

        Raises:
            InvalidArgument: these are no words.
        """
        if program is None:
            return self
        try:
            words = tuple(shlex.split(program))
        except ValueError as error:
            raise InvalidArgument(f"--program {program!r} cannot be taken apart: {error}") from None
        if not words:
            raise InvalidArgument("--program is empty: give the words that start the target")
        return replace(self, program=words)

    def version(self) -> str:
        """What it says of itself, ``?`` where it says nothing.

        Raises:
            InvalidArgument: there is no such program.
        """
        try:
            done = subprocess.run(  # noqa: S603 - the user's own command, no shell
                [*self.program, *self.asked],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                timeout=_VERSION_SECONDS,
            )
        except OSError as error:
            hint = "install it, or name it with --program"
            raise InvalidArgument(f"{self.name}: {self.program[0]}: {error.strerror}; {hint}") from None
        except subprocess.TimeoutExpired:
            return "?"
        found = _VERSION.search(done.stdout + done.stderr)
        return found[0] if found else "?"


def _storage_daemon(folder: Path) -> list[str]:
    return [
        *("--blockdev", f"driver=file,node-name=file,filename={folder / 'image'}"),
        *("--export", f"type=vhost-user-blk,id=export,node-name=file,writable=on,addr.type=unix,addr.path={folder}/s"),
    ]


def _testpmd(folder: Path) -> list[str]:
    return [
        *("--no-huge", "-m", "256", "--no-pci", "--lcores", "0@0,1@0", "--file-prefix", f"judge{os.getpid()}"),
        *("--no-telemetry", "--vdev", f"net_vhost0,iface={folder / 's'}", "--"),
        *("-i", "--nb-cores=1", "--forward-mode=rxonly", "--auto-start", "--total-num-mbufs=2048", "--no-mlockall"),
    ]


def _blk_pci(folder: Path) -> list[str]:
    drive = f"if=none,id=d,file={folder / 'image'},format=raw"
    return ["-drive", drive, "-device", "virtio-blk-pci,addr=2,drive=d,packed=on,disable-legacy=on"]


def _rng_pci(_folder: Path) -> list[str]:
    words = "virtio-rng-pci,addr=2,rng=r,packed=on,disable-legacy=on"
    return ["-object", "rng-random,id=r,filename=/dev/urandom", "-device", words]


def _own(folder: Path) -> list[str]:
    return ["serve", "--device", "blk", "--image", str(folder / "image"), "--socket", str(folder / "s")]


_GET_ID: Final = Request(
    readable=int(RequestType.GET_ID).to_bytes(4, "little") + bytes(12),
    writable=_SERIAL_BYTES + 1,
    right=_blk_right,
)

_ALL: Final = (
    Target(
        name="virtio-test",
        what="our own block device",
        carrier="vhost-user",
        program=(sys.executable, "-m", "virtio_test"),
        arguments=_own,
        good=_GET_ID,
    ),
    Target(
        name="qemu-storage-daemon",
        what="QEMU's vhost-user-blk export",
        carrier="vhost-user",
        program=("qemu-storage-daemon",),
        arguments=_storage_daemon,
        good=_GET_ID,
    ),
    Target(
        name="dpdk-testpmd",
        what="DPDK's net_vhost, its transmit queue",
        carrier="vhost-user",
        program=("dpdk-testpmd",),
        arguments=_testpmd,
        queues=2,
        attacked=1,
        good=Request(readable=_FRAME),
        asked=("-v", "--no-huge", "--no-pci", "-m", "64", "--no-telemetry", "--", "--help"),
        up="testpmd> ",
        polls=True,
    ),
    Target(
        name="qemu-virtio-blk",
        what="QEMU's virtio-blk-pci, by its test protocol",
        carrier="qtest",
        program=("qemu-system-x86_64",),
        arguments=_blk_pci,
        good=_GET_ID,
    ),
    Target(
        name="qemu-virtio-rng",
        what="QEMU's virtio-rng-pci, by its test protocol",
        carrier="qtest",
        program=("qemu-system-x86_64",),
        arguments=_rng_pci,
        good=Request(writable=16),
    ),
)
TARGETS: Final = MappingProxyType({each.name: each for each in _ALL})
"""What is known, by name."""


def named(name: str) -> Target:
    """The target of that name.

    Raises:
        InvalidArgument: there is none.
    """
    found = TARGETS.get(name)
    if found is None:
        raise InvalidArgument(f"no target is called {name!r}; known are {', '.join(TARGETS)}")
    return found
