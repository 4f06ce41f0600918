"""Our virtio-blk before Linux' own driver and before SeaBIOS: over vfio-user, and over vhost-user."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.combinations import record
from tests.kernel import build, checks, disk
from tests.kernel.checks import shell
from tests.kernel.qemu import Firmware, Qemu, root_port, vfio_user, vhost_user_blk
from tests.kernel.server import Server

pytestmark = pytest.mark.kernel

Serve = Callable[..., Server]
Boot = Callable[..., Qemu]

FUNCTION = ("--transport", "pci", "--carrier", "vfio-user")
TRANSPORTS = {
    "root bus": ("pci generic, MSI-X", "vfio-user"),
    "express": ("pci generic behind a port, MSI-X", "vfio-user"),
    "vhost-user": ("pci modern, MSI-X", "vhost-user"),
}
MODULES = ("virtio_pci", "virtio_blk")
# In Python and natively: each transport in one of them for the one kernel, and in the other for the next.
NATIVE = (("adaptive", None, "blocking"), (None, "loop", None))


def _driver(guest: Qemu, name: str) -> str:
    """The virtio device behind a disk."""
    return shell(guest, f"basename $(readlink -f /sys/block/{name}/device)")[0]


def _disks(guest: Qemu) -> dict[str, str]:
    """Serial number of each disk to its name."""
    names = shell(guest, "ls /sys/block | grep vd")
    return {shell(guest, f"cat /sys/block/{name}/serial")[0]: name for name in names}


def test_file_systems_keep_what_is_written(serve: Serve, boot: Boot, tmp_path: Path) -> None:
    """Each kernel fills them, reads them after a remount, and the next one, from servers of its own, finds the same."""
    images = {name: disk.make(tmp_path / name) for name in TRANSPORTS}
    sums: dict[str, list[str]] = {}
    for kernel, how in zip((build.debian_kernel(), build.testing_kernel()), NATIVE, strict=True):
        asked = {
            name: (
                "--device",
                "blk",
                "--image",
                str(image),
                "--serial",
                name,
                *(("--native", native) if native else ()),
            )
            for (name, image), native in zip(images.items(), how, strict=True)
        }
        servers = [
            serve(*FUNCTION, *asked["root bus"], "--queues", "2"),
            serve(*FUNCTION, *asked["express"], "--express", "--features", "-RING_PACKED"),
            serve(*asked["vhost-user"]),
        ]
        bus, express, vhost = (server.path for server in servers)
        devices = [*root_port(), *vfio_user(bus, addr="4.0"), *vfio_user(express, bus="root"), *vhost_user_blk(vhost)]
        guest = boot(devices, kernel=kernel, modules=MODULES, tools=True, cpus=2)
        disks = _disks(guest)
        assert disks.keys() == images.keys()
        assert shell(guest, f"ls /sys/block/{disks['root bus']}/mq") == ["0", "1"], "a request queue for each processor"
        for name, at in disks.items():
            assert shell(guest, f"cat /sys/block/{at}/size") == [str(disk.SIZE // 512)]
            disk.mount(guest, at)
            if name in sums:
                disk.verify(guest, at, sums[name])
                # Discards what is free, all of the disk nearly.
                shell(guest, f"rm -r /{at}/f* /{at}/d; fstrim /{at}")
            sums[name] = disk.fill(guest, at)
            disk.remount(guest, at)
            disk.verify(guest, at, sums[name])
            shell(guest, f"umount /{at}")
            transport, carrier = TRANSPORTS[name]
            native = dict(zip(images, how, strict=True))[name]
            device = f"blk, native ({native})" if native else "blk"
            checks.ran(guest, device=device, transport=transport, carrier=carrier, at=_driver(guest, at))
        guest.power_off()
        for server in servers:
            server.wait_for_disconnects(1)
            assert server.stop() == 0
        for image in images.values():
            disk.check(image)


def test_a_disk_that_may_only_be_read(serve: Serve, boot: Boot, tmp_path: Path) -> None:
    image = disk.make(tmp_path / "image")
    before = image.read_bytes()
    asked = ("--device", "blk", "--image", str(image), "--read-only", "--serial")
    function = serve(*FUNCTION, *asked, "vfio-user")
    vhost = serve(*asked, "vhost-user")
    guest = boot([*vfio_user(function.path), *vhost_user_blk(vhost.path)], modules=MODULES, tools=True)
    disks = _disks(guest)
    for name in disks.values():
        assert shell(guest, f"cat /sys/block/{name}/ro") == ["1"]
        guest.command(f"sh dd if=/dev/zero of=/dev/{name} count=1 conv=fsync", status=1)
        shell(
            guest,
            f"mkdir /{name}; mount -t ext4 -o ro,noload /dev/{name} /{name}; ls /{name} | grep lost; umount /{name}",
        )
    guest.power_off()
    assert image.read_bytes() == before


@pytest.mark.parametrize("machine", ["q35", "pc"])
@pytest.mark.parametrize("way", ["generic", "non-transitional", "vhost-user"])
def test_seabios_boots_from_it(serve: Serve, tmp_path: Path, machine: str, way: str) -> None:
    """It loads the first sector to start it; what starts there has it read another."""
    image = disk.make(tmp_path / "image")
    asked = ("--device", "blk", "--image", str(image))
    if way == "vhost-user":
        device = vhost_user_blk(serve(*asked).path)
    else:
        device = vfio_user(serve(*FUNCTION, *asked, "--flavour", way).path)
    _boots(device, machine, transport="pci modern" if way == "vhost-user" else f"pci {way}", by_messages=False)


def test_seabios_boots_with_memory_that_is_not_shared(serve: Serve, tmp_path: Path) -> None:
    """It moves memory about right after it has started the device, and QEMU answers no access of ours meanwhile."""
    image = disk.make(tmp_path / "image")
    for machine in ("q35", "pc"):
        device = vfio_user(serve(*FUNCTION, "--device", "blk", "--image", str(image)).path)
        _boots(device, machine, transport="pci generic", by_messages=True)


def _boots(device: list[str], machine: str, *, transport: str, by_messages: bool) -> None:
    with Firmware(device, machine=machine, shared=not by_messages) as firmware:
        firmware.wait_for("boot: sector 0 runs")
        firmware.wait_for("boot: sector 1 was read")
    version = re.search(r"\d+\.\d+", build.qemu().version)
    assert version is not None
    carrier = "vhost-user" if transport == "pci modern" else "vfio-user"
    record(
        device="blk", transport=transport, carrier=f"{carrier}, memory by messages" if by_messages else carrier,
        # SeaBIOS knows no other ring.
        ring="split", peer=f"SeaBIOS, QEMU {version[0]} {machine}",
    )  # fmt: skip
