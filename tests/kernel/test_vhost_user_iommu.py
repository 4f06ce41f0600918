"""Linux behind QEMU's IOMMU before our vhost-user back-end: each address that the driver gives is translated."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kernel import checks, disk
from tests.kernel.qemu import Qemu, vhost_user_blk
from tests.kernel.server import Server

pytestmark = pytest.mark.kernel

TRANSLATED = ("iommu_platform=on", "disable-legacy=on")


@pytest.mark.row("B16")
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_requests_through_an_iommu(
    serve: Callable[..., Server], boot: Callable[..., Qemu], tmp_path: Path, *, packed: bool
) -> None:
    """The guest maps and unmaps for each request: what the back-end lacks it asks for, and what is unmapped is gone."""
    image, trace = disk.make(tmp_path / "image"), tmp_path / "trace"
    server = serve("--device", "blk", "--image", str(image), "--features", "+ACCESS_PLATFORM")
    device = vhost_user_blk(server.path, properties=(*TRANSLATED, f"packed={'on' if packed else 'off'}"))
    device += ["-trace", f"vhost_iotlb_miss,file={trace}"]
    guest = boot(device, modules=("virtio_pci", "virtio_blk"), iommu=True, tools=True, append="iommu.strict=1")
    agreed = checks.features(guest)
    assert (checks.ACCESS_PLATFORM in agreed, checks.RING_PACKED in agreed) == (True, packed)
    disk.swap(guest, "vda", image)
    checks.ran(guest, device="blk", transport="pci modern, MSI-X, IOMMU", carrier="vhost-user")
    guest.power_off()
    server.wait_for_disconnects(1)
    # Each request brings addresses of its own; two lines for each miss.
    assert trace.read_text().count("vhost_iotlb_miss") > 1000
    assert "refused" not in server.log
    assert "stopped" not in server.log
    assert server.stop() == 0
