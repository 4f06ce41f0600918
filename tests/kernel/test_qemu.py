"""The same guest code on stock Debian under QEMU, in front of the same server: virtio over PCI and over MMIO."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.kernel import build, checks
from tests.kernel.qemu import Qemu
from tests.kernel.server import Server
from tests.kernel.transcript import device_request

pytestmark = pytest.mark.kernel

Serve = Callable[..., Server]
Boot = Callable[..., Qemu]
SPLIT = ("--features", "-RING_PACKED")
PACKED = ()


TRANSPORTS = {"q35": "pci modern", "microvm": "mmio"}


@pytest.mark.parametrize(
    ("machine", "ring"), [("q35", SPLIT), ("q35", PACKED), ("microvm", SPLIT), ("microvm", PACKED)]
)
def test_a_request_reads_as_the_original_on_both_consoles(
    serve: Serve, qemu: Boot, machine: str, ring: tuple[str, ...]
) -> None:
    server = serve(*ring)
    guest = qemu(server, on=machine)
    guest.load()
    assert (checks.RING_PACKED in checks.features(guest)) == (ring == PACKED)
    checks.request(guest, 10)
    assert server.said(5) == device_request(10)
    checks.ran(guest, transport=TRANSPORTS[machine], carrier="vhost-user")
    guest.command("rmmod virtio_test")
    guest.load("quiet=1")
    guest.command("run virtio 11 1000", timeout=60)
    guest.power_off()
    assert server.said(5 * 1001)[5:] == device_request(11) * 1000
    assert server.stop() == 0


@pytest.mark.parametrize(("machine", "change"), [("q35", "+IN_ORDER"), ("microvm", "+IN_ORDER,-RING_PACKED")])
def test_a_newer_kernel_takes_buffers_in_order(serve: Serve, qemu: Boot, machine: str, change: str) -> None:
    """Linux 6.1 does not accept IN_ORDER; a newer one drives both rings by it, over PCI and over MMIO."""
    server = serve("--features", change)
    guest = qemu(server, on=machine, kernel=build.testing_kernel())
    guest.load()
    agreed = checks.features(guest)
    assert checks.IN_ORDER in agreed
    assert (checks.RING_PACKED in agreed) == ("-" not in change)
    checks.request(guest, 10)
    assert server.said(5) == device_request(10)
    checks.ran(guest, transport=TRANSPORTS[machine], carrier="vhost-user")
    guest.command("write /sys/module/virtio_test/parameters/quiet 1")
    for number in range(4):
        guest.command(f"start virtio {number} 250")
    guest.command("wait", timeout=60)
    lines = server.said(5 * 1001)
    requests = [lines[i : i + 5] for i in range(5, len(lines), 5)]
    assert [requests.count(device_request(number)) for number in range(4)] == [250] * 4


@pytest.mark.parametrize("ring", [("--features", "-RING_PACKED,-INDIRECT_DESC"), ("--features", "-INDIRECT_DESC")])
def test_a_full_queue_is_waited_for(serve: Serve, qemu: Boot, ring: tuple[str, ...]) -> None:
    """Four descriptors hold two requests; eight processes want to send."""
    server = serve(*ring)
    guest = qemu(server, queue_size=4)
    guest.load("quiet=1")
    for number in range(8):
        guest.command(f"start virtio {number} 100")
    guest.command("wait", timeout=60)
    lines = server.said(5 * 800)
    requests = [lines[i : i + 5] for i in range(0, len(lines), 5)]
    assert [requests.count(device_request(number)) for number in range(8)] == [100] * 8


def test_surprise_removal_and_return(serve: Serve, qemu: Boot) -> None:
    server = serve()
    guest = qemu(server)
    guest.load()
    checks.request(guest, 1)
    server.pause()
    for number in (2, 3):
        guest.command(f"start virtio {number}")
    guest.command("sleep 0.2")
    # The bus removes the device; QEMU asks the back-end to stop and holds the guest until it answers. What the back-end
    # finds first, requests or the end, is a race that both may win: every writer hears one of the two, once.
    remove = "write /sys/bus/virtio/devices/virtio0/../remove 1"
    guest.start(remove)
    guest.start("wait")
    guest.console.wait_for("virtio_test virtio0: 2 in flight fail with -19")
    server.resume()
    guest.console.wait_for(f"guest: end: 0 {remove}")
    assert sum(guest.ends_of_writers((2, 3))) == 2
    guest.command("write /sys/bus/pci/rescan 1")
    checks.request(guest, 4)
    guest.command("rmmod virtio_test")
    guest.power_off()
