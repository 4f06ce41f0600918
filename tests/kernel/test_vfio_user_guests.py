"""Guests that take a PCI function in unusual ways.

By the legacy rules, with every feature, through an IOMMU, with memory that they do not share, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.kernel import build, checks, disk
from tests.kernel.pci import bound, interrupts
from tests.kernel.qemu import Qemu, vfio_user
from tests.kernel.server import Server
from tests.kernel.transcript import device_request

pytestmark = pytest.mark.kernel

Serve = Callable[..., Server]
Boot = Callable[..., Qemu]

FUNCTION = ("--transport", "pci", "--carrier", "vfio-user")
MODERN = (*FUNCTION, "--flavour", "non-transitional")
EVERY_FEATURE = "+IN_ORDER,+RING_RESET,+ORDER_PLATFORM,+NOTIFICATION_DATA,+NOTIF_CONFIG_DATA,+SUSPEND"


def _at(servers: Sequence[Server]) -> list[str]:
    """QEMU's words for the functions of these servers, from slot 4 on."""
    return [word for slot, server in enumerate(servers, 4) for word in vfio_user(server.path, addr=f"{slot:02x}.0")]


def _slot(index: int) -> str:
    return f"0000:00:{4 + index:02x}.0"


def _load(guest: Qemu) -> None:
    guest.command("write /sys/bus/virtio/drivers_autoprobe 0")
    guest.load()


@pytest.mark.parametrize(
    ("kernel", "line"),
    [(build.debian_kernel, False), (build.debian_kernel, True), (build.testing_kernel, False)],
    ids=["6.1-MSI-X", "6.1-INTx", "7.2-MSI-X"],
)
def test_a_legacy_driver(
    serve: Serve, boot: Boot, tmp_path: Path, kernel: Callable[[], build.Kernel], *, line: bool
) -> None:
    """The header of the legacy registers has 4 bytes more with MSI-X, so both are tried."""
    image = disk.make(tmp_path / "image")
    servers = [
        serve(*FUNCTION, "--flavour", "transitional"),
        serve(*FUNCTION, "--device", "rng"),
        serve(*FUNCTION, "--device", "blk", "--image", str(image)),
    ]
    guest = boot(
        _at(servers),
        kernel=kernel(),
        modules=("virtio_pci", "virtio_rng", "virtio_blk"),
        parameters={"virtio_pci": "force_legacy=1"},
        append="pci=nomsi" if line else "",
        tools=True,
    )
    how = "INTx" if line else "MSI-X"
    _load(guest)
    with bound(guest, _slot(0)) as device:
        agreed = checks.features(guest, device)
        assert checks.VERSION_1 not in agreed
        assert max(agreed) < 32
        for number in (10, 255):
            checks.request(guest, number)
        assert servers[0].said(10) == device_request(10) + device_request(255)
        assert all(("IO-APIC" in each) == line for each in interrupts(guest, device))
        checks.ran(guest, transport=f"pci legacy, {how}", carrier="vfio-user", at=device)
        guest.command("write /sys/module/virtio_test/parameters/quiet 1")
        guest.command("run virtio 11 300")
        assert servers[0].said(10 + 5 * 300)[10:] == device_request(11) * 300
    assert len(checks.shell(guest, "dd if=/dev/hwrng bs=64 count=4 2>/dev/null | od -v -t x1 | sort -u")) == 16 + 1
    checks.ran(guest, device="rng", transport=f"pci legacy, {how}", carrier="vfio-user", at="virtio1")
    disk.swap(guest, "vda", image)
    checks.ran(guest, device="blk", transport=f"pci legacy, {how}", carrier="vfio-user", at="virtio2")


def test_every_feature_of_a_newer_kernel(serve: Serve, boot: Boot, tmp_path: Path) -> None:
    """Both rings, in order, with notifications of 4 bytes that carry the ring's position."""
    servers = [serve(*MODERN, "--features", EVERY_FEATURE + change) for change in ("", ",-RING_PACKED")]
    trace = tmp_path / "trace"
    guest = boot(
        [*_at(servers), "-trace", "vfio_region_write", "-D", str(trace)], kernel=build.testing_kernel(), tools=True
    )
    _load(guest)
    for index, server in enumerate(servers):
        with bound(guest, _slot(index)) as device:
            agreed = checks.features(guest, device)
            wanted = {checks.IN_ORDER, checks.NOTIFICATION_DATA, checks.ORDER_PLATFORM, checks.RING_RESET}
            assert wanted | {checks.EVENT_IDX, checks.INDIRECT_DESC, checks.VERSION_1} <= agreed
            assert (checks.RING_PACKED in agreed) == (index == 0)
            assert checks.SUSPEND not in agreed, "no Linux knows it yet"
            for number in (10, 255):
                checks.request(guest, number)
            assert server.said(10) == device_request(10) + device_request(255)
            checks.ran(guest, transport="pci modern, MSI-X, notification_data", carrier="vfio-user", at=device)
            guest.command("write /sys/module/virtio_test/parameters/quiet 1")
            for number in range(4):
                guest.command(f"start virtio {number} 100")
            guest.command("wait", timeout=60)
            lines = server.said(10 + 5 * 400)[10:]
            requests = [lines[i : i + 5] for i in range(0, len(lines), 5)]
            assert [requests.count(device_request(number)) for number in range(4)] == [100] * 4
            guest.command("write /sys/module/virtio_test/parameters/quiet 0")
    kicks = [line for line in trace.read_text().splitlines() if "region4+0x3000" in line]
    assert len(kicks) >= 4
    assert all(line.endswith(", 4)") for line in kicks), "each is one write of 4 bytes"
    first = [int(line.split(", ")[1], 16) for line in kicks if str(servers[1].path) in line][:2]
    assert first == [1 << 16, 2 << 16], "queue 0, and the next avail index of the split ring"


@pytest.mark.parametrize("kernel", [build.debian_kernel, build.testing_kernel], ids=["6.1", "7.2"])
def test_through_an_iommu(serve: Serve, boot: Boot, tmp_path: Path, kernel: Callable[[], build.Kernel]) -> None:
    """The guest gives addresses of QEMU's IOMMU, which maps and unmaps them for each request."""
    image = disk.make(tmp_path / "image")
    servers = [serve(*MODERN, "--features", "+ACCESS_PLATFORM" + change) for change in ("", ",-RING_PACKED")]
    blk = serve(*MODERN, "--device", "blk", "--image", str(image), "--features", "+ACCESS_PLATFORM")
    guest = boot(_at([*servers, blk]), kernel=kernel(), modules=("virtio_pci", "virtio_blk"), iommu=True, tools=True)
    assert checks.shell(guest, f"readlink /sys/bus/pci/devices/{_slot(0)}/iommu_group")
    _load(guest)
    for index, server in enumerate(servers):
        with bound(guest, _slot(index)) as device:
            agreed = checks.features(guest, device)
            assert checks.ACCESS_PLATFORM in agreed
            checks.request(guest, 10)
            assert server.said(5) == device_request(10)
            checks.ran(guest, transport="pci modern, MSI-X, IOMMU", carrier="vfio-user", at=device)
            guest.command("write /sys/module/virtio_test/parameters/quiet 1")
            guest.command("run virtio 11 100", timeout=60)
            assert server.said(5 * 101)[5:] == device_request(11) * 100
            guest.command("write /sys/module/virtio_test/parameters/quiet 0")
    assert checks.ACCESS_PLATFORM in checks.features(guest, "virtio2")
    disk.swap(guest, "vda", image)
    checks.ran(guest, device="blk", transport="pci modern, MSI-X, IOMMU", carrier="vfio-user", at="virtio2")


def test_memory_that_is_not_shared(serve: Serve, boot: Boot, tmp_path: Path) -> None:
    """QEMU gives no descriptor for the guest's memory: each access is a message to it."""
    image = disk.make(tmp_path / "image")
    servers = [serve(*FUNCTION, "--features", change) for change in ("-IN_ORDER", "-IN_ORDER,-RING_PACKED")]
    # Its thread finds memory that it cannot reach, and leaves it to the owner loop.
    blk = serve(*FUNCTION, "--device", "blk", "--image", str(image), "--native", "adaptive")
    guest = boot(_at([*servers, blk]), modules=("virtio_pci", "virtio_blk"), shared=False, tools=True)
    _load(guest)
    for index, server in enumerate(servers):
        with bound(guest, _slot(index)) as device:
            checks.request(guest, 10)
            assert server.said(5) == device_request(10)
            checks.ran(guest, transport="pci generic, MSI-X", carrier="vfio-user, memory by messages", at=device)
            guest.command("write /sys/module/virtio_test/parameters/quiet 1")
            guest.command("run virtio 11 50", timeout=60)
            assert server.said(5 * 51)[5:] == device_request(11) * 50
            guest.command("write /sys/module/virtio_test/parameters/quiet 0")
    disk.swap(guest, "vda", image)
    carrier = "vfio-user, memory by messages"
    checks.ran(guest, device="blk, native (adaptive)", transport="pci generic, MSI-X", carrier=carrier, at="virtio2")


def test_the_next_guest_is_served_after_one_was_killed(serve: Serve, boot: Boot) -> None:
    server = serve(*FUNCTION)
    fds, mappings = server.fds(), server.mappings()
    for number in range(2):
        guest = boot(_at([server]))
        guest.load()
        checks.request(guest, 10 + number)
        guest.command("write /sys/module/virtio_test/parameters/quiet 1")
        # It dies with requests on their way.
        guest.command("start virtio 9 100000")
        guest.close()
        server.wait_for_disconnects(number + 1)
        assert server.fds() == fds
        assert abs(server.mappings() - mappings) <= 4
    assert server.stop() == 0
    assert not server.path.exists()
