"""QEMU machines with every device class on them, in every form: one process carries all that a test can ask for."""

from __future__ import annotations

import contextlib
import re
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Self

from virtio_test.carrier.qtest import QtestMachine
from virtio_test.carrier.qtest.process import Machine
from virtio_test.clock import MonotonicClock

from tests.kernel import build

Kind = Literal["rng", "blk", "net", "console"]
Form = Literal["modern", "transitional", "legacy"]

KINDS: tuple[Kind, ...] = ("rng", "blk", "net", "console")
FORMS: tuple[Form, ...] = ("modern", "transitional", "legacy")

IMAGE_SIZE = 4 << 20
_FORM_OPTIONS = {"modern": "disable-legacy=on", "transitional": "disable-legacy=off", "legacy": "disable-modern=on"}
_DEVICES = {"rng": "virtio-rng", "blk": "virtio-blk", "net": "virtio-net", "console": "virtio-serial"}


class Spot(NamedTuple):
    """One device: what it is, and its slot or transport."""

    kind: Kind
    form: str
    number: int


class World:
    """A running machine with its devices, and the other end of whatever they are connected to.

    Args:
        machine: ``q35``, ``pc`` or ``microvm``.
        forms: which forms of each class there are; a legacy microvm has ``legacy`` alone.
        more: further words for QEMU.
    """

    def __init__(self, machine: Machine, forms: Sequence[str] = FORMS, more: Sequence[str] = ()) -> None:
        self.name: Machine = machine
        self._stack = contextlib.ExitStack()
        try:
            self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="vt-")))
            self.spots: dict[tuple[Kind, str], Spot] = {}
            self._wires: dict[int, socket.socket] = {}
            words = list(more)
            if machine == "microvm" and "legacy" in forms:
                words += ["-global", "virtio-mmio.force-legacy=true"]
            for form in forms:
                for kind in KINDS:
                    words += self._add(kind, form)
            qemu = build.qemu()
            self.machine = self._stack.enter_context(
                QtestMachine(qemu.command(), words, machine=machine, env=qemu.environment())
            )
        except BaseException:
            self._stack.close()
            raise

    @property
    def peer(self) -> str:
        """Who is on the other side, for the table of what ran."""
        found = re.search(r"\d+\.\d+", build.qemu().version)
        assert found is not None
        return f"QEMU {found[0]} {self.name}"

    def _add(self, kind: Kind, form: str) -> list[str]:
        number = len(self.spots) + (0 if self.name == "microvm" else 2)
        self.spots[kind, form] = Spot(kind, form, number)
        options = ["packed=on", "in_order=on", "queue_reset=on"] if form != "legacy" else []
        if self.name == "microvm":
            suffix, place = "device", [f"bus=virtio-mmio-bus.{number}"]
        else:
            suffix, place = "pci", [f"addr={number:#x}", _FORM_OPTIONS[form]]
        name = f"{_DEVICES[kind]}-{suffix}"
        behind, own = getattr(self, f"_behind_{kind}")(number)
        return [*behind, "-device", ",".join([name, *place, *options, *own]), *self._on_top(kind, number)]

    def _behind_rng(self, number: int) -> tuple[list[str], list[str]]:
        return ["-object", f"rng-random,id=r{number},filename=/dev/urandom"], [f"rng=r{number}"]

    def _behind_blk(self, number: int) -> tuple[list[str], list[str]]:
        image = self.folder / f"image{number}"
        with image.open("wb") as file:
            file.truncate(IMAGE_SIZE)
        drive = f"if=none,id=d{number},file={image},format=raw,discard=unmap,detect-zeroes=unmap"
        return ["-drive", drive], [f"drive=d{number}", f"serial=disk-{number}", "num-queues=2"]

    def _behind_net(self, number: int) -> tuple[list[str], list[str]]:
        ours = self._stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        ours.bind(str(self.folder / f"ours{number}"))
        ours.settimeout(5)
        self._wires[number] = ours
        dgram = f"dgram,id=n{number},local.type=unix,local.path={self.folder}/theirs{number}"
        dgram += f",remote.type=unix,remote.path={self.folder}/ours{number}"
        return ["-netdev", dgram], [f"netdev=n{number}", f"mac={self.mac(number).hex(':')}"]

    def _behind_console(self, number: int) -> tuple[list[str], list[str]]:
        words: list[str] = []
        for port in (0, 1):
            words += ["-chardev", f"socket,id=c{number}p{port},path={self.folder}/c{number}p{port},server=on,wait=off"]
        return words, [f"id=s{number}", "max_ports=4"]

    @staticmethod
    def _on_top(kind: Kind, number: int) -> list[str]:
        if kind != "console":
            return []
        return [
            *("-device", f"virtconsole,bus=s{number}.0,nr=0,chardev=c{number}p0"),
            *("-device", f"virtserialport,bus=s{number}.0,nr=1,chardev=c{number}p1,name=org.example.{number}"),
        ]

    @staticmethod
    def mac(number: int) -> bytes:
        """The address of a network device."""
        return bytes([0x52, 0x54, 0, 0, 0, number])

    def image(self, number: int) -> Path:
        """The file behind a block device."""
        return self.folder / f"image{number}"

    def wire(self, number: int) -> socket.socket:
        """Our end of a network device's wire, with nothing on it."""
        wire = self._wires[number]
        wire.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                wire.recv(65536)
        wire.settimeout(5)
        return wire

    def put_on_wire(self, number: int, frame: bytes) -> None:
        """A frame for a network device."""
        self._wires[number].sendto(frame, str(self.folder / f"theirs{number}"))

    def terminal(self, number: int, port: int) -> socket.socket:
        """A terminal at a console's port; the caller closes it."""
        terminal = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        terminal.settimeout(5)
        terminal.connect(str(self.folder / f"c{number}p{port}"))
        return terminal

    @property
    def usable(self) -> bool:
        """Whether the process is still there."""
        return self.machine.process.running and isinstance(self.machine.loop.clock, MonotonicClock)

    def close(self) -> None:
        """End it."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
