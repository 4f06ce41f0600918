"""Our network device before Linux' own driver: frames that come back as they were sent, over each carrier."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.kernel import build, checks
from tests.kernel.checks import said, shell
from tests.kernel.guest import Uml
from tests.kernel.qemu import Qemu, vfio_user, vhost_user_net
from tests.kernel.server import Server

pytestmark = pytest.mark.kernel

Serve = Callable[..., Server]
NET = 1
COUNT = 500
FUNCTION = ("--transport", "pci", "--carrier", "vfio-user")
MAC = "52:54:00:00:00:0"


FEW = ("--features", "-RING_PACKED,-MRG_RXBUF,-INDIRECT_DESC")


@pytest.mark.parametrize("options", [(), (*FEW, "--native", "adaptive")], ids=["all", "few, native"])
def test_frames_come_back_to_user_mode_linux(serve: Serve, uml: Callable[..., Uml], options: tuple[str, ...]) -> None:
    server = serve("--device", "net", "--mac", f"{MAC}1", *options)
    guest = uml(server, virtio_id=NET, files=build.net_files())
    assert said(guest.command("read /sys/class/net/eth0/address")) == [f"{MAC}1"]
    assert said(guest.command(f"run frame eth0 {COUNT}")) == [f"{COUNT} frames came back"]
    assert said(guest.command("read /sys/class/net/eth0/statistics/rx_dropped")) == ["0"]
    checks.ran(guest, device="net", transport="vhost-user", carrier="vhost-user")
    guest.power_off()
    assert server.stop() == 0


@pytest.mark.parametrize(
    ("kernel", "native"),
    [(build.debian_kernel, ()), (build.testing_kernel, ("--native", "blocking"))],
    ids=["6.1", "7.2, native"],
)
def test_frames_come_back_to_qemus_guests(
    serve: Serve, boot: Callable[..., Qemu], kernel: Callable[[], build.Kernel], native: tuple[str, ...]
) -> None:
    """As a PCI function, whose control queue is ours, and behind QEMU's front-end, which has one of its own."""
    function = serve(*FUNCTION, "--device", "net", "--mac", f"{MAC}1", "--queues", "2", "--mtu", "1400", *native)
    vhost = serve("--device", "net", "--queues", "2", *native)
    devices = vfio_user(function.path, addr="4.0")
    devices += vhost_user_net(vhost.path, pairs=2, properties=(f"mac={MAC}2", "addr=5.0", "vectors=6"))
    modules = ("virtio_pci", "virtio_net", "af_packet")
    guest = boot(devices, kernel=kernel(), modules=modules, tools=True, files=build.net_files(), cpus=2)
    names = {shell(guest, f"cat /sys/class/net/{name}/address")[0]: name for name in ("eth0", "eth1")}
    assert names.keys() == {f"{MAC}1", f"{MAC}2"}
    for address, carrier in ((f"{MAC}1", "vfio-user"), (f"{MAC}2", "vhost-user")):
        name = names[address]
        queues = shell(guest, f"ls -d /sys/class/net/{name}/queues/*")
        assert len(queues) == 4, "two of each kind, one for each processor"
        mtu = 1400 if carrier == "vfio-user" else 1500
        assert shell(guest, f"cat /sys/class/net/{name}/mtu") == [str(mtu)]
        assert said(guest.command(f"run frame {name} {COUNT}")) == [f"{COUNT} frames came back"]
        at = shell(guest, f"basename $(readlink -f /sys/class/net/{name}/device)")[0]
        transport = "pci generic, MSI-X" if carrier == "vfio-user" else "pci modern, MSI-X"
        checks.ran(guest, device="net", transport=transport, carrier=carrier, at=at)
    guest.power_off()
