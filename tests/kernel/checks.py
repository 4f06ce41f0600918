"""What a guest can be asked about its devices, and noting what ran."""

from __future__ import annotations

import re

from tests.combinations import Combination, record
from tests.kernel import build
from tests.kernel.console import GuestError
from tests.kernel.guest import Guest, Uml
from tests.kernel.qemu import Qemu
from tests.kernel.transcript import driver_request

INDIRECT_DESC, EVENT_IDX = 28, 29
VERSION_1, ACCESS_PLATFORM, RING_PACKED, IN_ORDER, ORDER_PLATFORM = 32, 33, 34, 35, 36
NOTIFICATION_DATA, RING_RESET, SUSPEND = 38, 40, 43

_OUT = "guest: out: "


def said(lines: list[str]) -> list[str]:
    """What a program or a file of the guest said, without what the kernel said meanwhile."""
    return [line.removeprefix(_OUT) for line in lines if line.startswith(_OUT)]


def shell(guest: Guest, line: str, *, timeout: float = 60) -> list[str]:
    """What the guest's shell prints for a line of which every command must end with 0."""
    return said(guest.command(f"sh set -e; {line}", timeout=timeout))


def features(guest: Guest, device: str = "virtio0") -> frozenset[int]:
    """The features that guest and device agreed on."""
    bits = said(guest.command(f"read /sys/bus/virtio/devices/{device}/features"))[0]
    return frozenset(bit for bit, value in enumerate(bits) if value == "1")


def ring(agreed: frozenset[int]) -> str:
    """How the ring works that was agreed on, in words."""
    words = ["packed" if RING_PACKED in agreed else "split"]
    words += [name for bit, name in ((IN_ORDER, "in_order"), (EVENT_IDX, "event_idx")) if bit in agreed]
    return ", ".join(words)


def request(guest: Guest, number: int) -> None:
    """Sends one request; the driver must say what the original's says, and nothing else of the kind."""
    lines = [line for line in guest.command(f"run virtio {number}") if line.startswith("virtio ")]
    if lines != driver_request(number):
        raise GuestError(f"request {number} reads {lines}")


def ran(guest: Uml | Qemu, *, transport: str, carrier: str, device: str = "test", at: str = "virtio0") -> Combination:
    """Records that a device answered this guest, with the ring that they agreed on."""
    agreed = features(guest, at)
    return record(device=device, transport=transport, carrier=carrier, ring=ring(agreed), peer=peer(guest))


def peer(guest: Uml | Qemu) -> str:
    """Kernel, and machine with its version."""
    linux = f"Linux {guest.kernel.short}"
    if isinstance(guest, Uml):
        return f"{linux}, user-mode"
    found = re.search(r"\d+\.\d+", build.qemu().version)
    assert found is not None
    return f"{linux}, QEMU {found[0]} {guest.machine}"
