"""Entropy and console devices before Linux' own drivers: over vfio-user and over vhost-user."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.kernel import build, checks
from tests.kernel.checks import shell
from tests.kernel.qemu import Qemu, vfio_user, vhost_user_test
from tests.kernel.server import Server

pytestmark = pytest.mark.kernel

KERNELS = pytest.mark.parametrize(
    ("kernel", "native"), [(build.debian_kernel, "vhost-user"), (build.testing_kernel, "vfio-user")], ids=["6.1", "7.2"]
)
"""Each way to entropy in Python for one kernel, and by a native service in a thread for the other."""
FUNCTION = ("--transport", "pci", "--carrier", "vfio-user")
CARRIERS = ("vfio-user", "vhost-user")
RNG = 4


@KERNELS
def test_entropy_and_console(
    serve: Callable[..., Server], boot: Callable[..., Qemu], kernel: Callable[[], build.Kernel], native: str
) -> None:
    how = {name: ("--device", "rng", *(("--native", "adaptive") if name == native else ())) for name in CARRIERS}
    function, vhost = serve(*FUNCTION, *how["vfio-user"]), serve(*how["vhost-user"])
    console = serve("--declare", "console", program=("-m", "tests.kernel.own"))
    devices = [*vfio_user(function.path, addr="4.0"), *vfio_user(console.path, addr="5.0")]
    devices += vhost_user_test(vhost.path, virtio_id=RNG, config_size=0, queue_size=8, properties=("addr=6.0",))
    modules = ("virtio_pci", "virtio_rng", "virtio_console")
    guest = boot(devices, kernel=kernel(), modules=modules, tools=True)
    _entropy(guest, native)
    _console(guest, console)


def _entropy(guest: Qemu, native: str) -> None:
    current = "/sys/class/misc/hw_random/rng_current"
    names = shell(guest, "cat /sys/class/misc/hw_random/rng_available")[0].split()
    sources = [name for name in names if name.startswith("virtio_rng")]
    assert len(sources) == 2
    seen: set[str] = set()
    for source, device, carrier in zip(sources, ("virtio0", "virtio2"), CARRIERS, strict=True):
        shell(guest, f"echo {source} > {current}")
        assert shell(guest, f"cat {current}") == [source]
        for _ in range(3):
            seen |= set(shell(guest, "dd if=/dev/hwrng bs=512 count=1 2>/dev/null | sha256sum"))
        transport = "pci generic, MSI-X" if carrier == "vfio-user" else "pci modern, INTx"
        name = "rng, native (adaptive)" if carrier == native else "rng"
        checks.ran(guest, device=name, transport=transport, carrier=carrier, at=device)
    assert len(seen) == 6, "never the same twice"


def _console(guest: Qemu, server: Server) -> None:
    assert shell(guest, "cat /sys/class/virtio-ports/vport1p1/name") == ["echo"]
    shell(guest, "echo to the console > /dev/hvc0")
    server.console.wait_for("to the console")
    assert shell(guest, "stty size < /dev/hvc0") == ["43 132"]
    shell(guest, "head -c 60000 /dev/urandom > /sent")
    shell(guest, "exec 3<>/dev/vport1p1; cat /sent >&3; head -c 60000 <&3 > /got; cmp /sent /got")
    checks.ran(guest, device="console", transport="pci generic, MSI-X", carrier="vfio-user", at="virtio1")
