"""Our blk back-end dies while a guest writes, again and again; QEMU keeps its record, and the guest notices nothing."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kernel import build, checks, disk
from tests.kernel.checks import shell
from tests.kernel.qemu import Qemu, vhost_user_blk
from tests.kernel.server import Server

pytestmark = pytest.mark.kernel

Serve = Callable[..., Server]
Boot = Callable[..., Qemu]

KIB = 2048
KILLS = 4
RECONNECT_MS = 50


@pytest.mark.row("M20")
@pytest.mark.parametrize("kernel", [build.debian_kernel, build.testing_kernel], ids=["6.1", "7.2"])
def test_a_guest_goes_on_over_back_ends_that_are_killed(
    serve: Serve, boot: Boot, tmp_path: Path, kernel: Callable[[], build.Kernel]
) -> None:
    image = disk.make(tmp_path / "image")
    asked = ("--device", "blk", "--image", str(image))
    server = serve(*asked)
    guest = boot(
        vhost_user_blk(server.path, reconnect_ms=RECONNECT_MS), kernel=kernel(), modules=("virtio_pci", "virtio_blk"),
        tools=True,
    )  # fmt: skip
    shell(guest, f"dd if=/dev/urandom of=/data bs=64k count={KIB // 64} 2>/dev/null")
    # Past every cache, by two writers at once, over and over until the last back-end was killed.
    half = KIB // 128
    for name, at in (("one", 0), ("other", half)):
        write = f"dd if=/data of=/dev/vda bs=64k count={half} skip={at} seek={at} oflag=direct conv=notrunc"
        loop = f"while [ ! -e /stop ]; do {write} || echo {name} >> /failed; echo >> /{name}.done; done; rm /{name}"
        shell(guest, f"touch /{name}; ({loop}) > /dev/null 2>&1 &")
    with contextlib.ExitStack() as stack:
        for kills in range(KILLS):
            time.sleep(0.1)
            server.close()
            server = stack.enter_context(Server(server.path.parent, *asked))
            server.wait_for_log(" is connected", count=kills + 2)
        shell(guest, "touch /stop; while [ -e /one ] || [ -e /other ]; do sleep 0.1; done")
        # Every write was answered, and well.
        shell(guest, "[ -s /one.done ]; [ -s /other.done ]; [ ! -e /failed ]")
        want = shell(guest, "sha256sum /data")[0].split()[0]
        read = f"dd if=/dev/vda bs=64k count={KIB // 64} iflag=direct 2>/dev/null | sha256sum"
        assert shell(guest, read)[0].split()[0] == want
        assert hashlib.sha256(image.read_bytes()[: KIB << 10]).hexdigest() == want
        checks.ran(guest, device="blk", transport="pci modern, MSI-X", carrier="vhost-user, killed")
        guest.power_off()
