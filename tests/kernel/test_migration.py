"""A guest that is migrated while our back-end writes into its memory: what is written must have been marked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kernel import checks, disk
from tests.kernel.checks import shell
from tests.kernel.qemu import Qemu, vhost_user_blk
from tests.kernel.qmp import Monitor
from tests.kernel.server import Server

pytestmark = pytest.mark.kernel

MODULES = ("virtio_pci", "virtio_blk")
BUSY = "while :; do dd if=/dev/urandom of=/busy bs=1M count=8 conv=notrunc 2>/dev/null; done"
"""Dirties memory without end, so that QEMU goes through it again and again. Always the same pages: what is read from
the disk shall lie in others, which only the back-end has written."""


@pytest.mark.row("M15")
@pytest.mark.parametrize(("packed", "iommu"), [(False, False), (True, True)], ids=["split", "packed, IOMMU"])
def test_a_guest_goes_on_elsewhere_with_all_that_was_read(
    serve: Callable[..., Server], boot: Callable[..., Qemu], tmp_path: Path, *, packed: bool, iommu: bool
) -> None:
    """Files that were read after their pages had been sent are in the file, and in the next guest's page cache."""
    image, state = disk.make(tmp_path / "image"), tmp_path / "state"
    asked = ["--device", "blk", "--image", str(image)]
    properties = [f"packed={'on' if packed else 'off'}"]
    if iommu:
        asked += ["--features", "+ACCESS_PLATFORM"]
        properties += ["iommu_platform=on", "disable-legacy=on"]
    # Debian's kernel would empty each page itself before it is read into, and so mark it.
    options = {"modules": MODULES, "tools": True, "iommu": iommu, "append": "init_on_alloc=0"}
    first = serve(*asked)
    guest = boot(vhost_user_blk(first.path, properties=properties), **options)
    disk.mount(guest, "vda")
    sums = disk.fill(guest, "vda")
    disk.remount(guest, "vda")
    shell(guest, f"echo '{BUSY}' > /busy.sh")
    guest.start("start busybox sh /busy.sh")
    with Monitor(guest.monitor) as monitor:
        monitor.migrate(state)
        print(1, monitor.ask("query-migrate"))
        disk.verify(guest, "vda", sums)
        print(2, monitor.ask("query-migrate"))
        assert monitor.migrating, "the guest has read while it was"
        monitor.finish()
        print(3, monitor.ask("query-migrate"))
    guest.close()
    first.wait_for_disconnects(1)
    assert first.stop() == 0

    second = serve(*asked)
    other = boot(vhost_user_blk(second.path, properties=properties), incoming=state, **options)
    # What was read is in the page cache, and nothing is read again.
    disk.verify(other, "vda", sums)
    other.command("kill")
    disk.remount(other, "vda")
    disk.verify(other, "vda", sums)
    shell(other, "rm /vda/f2; sync; umount /vda")
    words = "pci modern, MSI-X, IOMMU" if iommu else "pci modern, MSI-X"
    checks.ran(other, device="blk", transport=f"{words}, migrated", carrier="vhost-user")
    other.power_off()
    disk.check(image)
