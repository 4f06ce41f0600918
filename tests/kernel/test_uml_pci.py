"""A PCI function in front of user-mode Linux: PCI over virtio, Linux' own virtio_pci, MSI-X and our driver module.

User-mode Linux 6.1 has neither I/O ports nor a handler for INTx: whatever the flavour, Linux uses the modern interface
and MSI-X there.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from virtio_test.devices.test import TestDevice
from virtio_test.spec.pcidev import UML_PCI_DEVICE_ID
from virtio_test.transport.pci.declaration import Declaration
from virtio_test.transport.pci.flavours import declare

from tests.kernel import checks
from tests.kernel.guest import Uml
from tests.kernel.server import Server
from tests.kernel.transcript import ACK, OPEN_FAILED, device_request, device_tick, driver_request, driver_tick

pytestmark = pytest.mark.kernel

Serve = Callable[..., Server]
Boot = Callable[..., Uml]

UML = ("--transport", "pci", "--carrier", "uml")
SLOT = "0000:00:00.0"
FUNCTION = f"/sys/bus/pci/devices/{SLOT}"
TROUBLE = re.compile(r"WARNING|BUG|Oops|Call Trace|virt-pci delay|unexpected virt-pci|blocked for more")


def attribute(guest: Uml, path: str) -> str:
    """The only line of a file."""
    # The kernel says things of its own in between.
    (line,) = [each for each in guest.command(f"read {path}") if each.startswith("guest: out: ")]
    return line.removeprefix("guest: out: ")


def boots(uml: Boot, server: Server) -> Uml:
    """A guest that gives its back-end time.

    The kernel waits for each answer in a loop that gives up after 40000 rounds of a microsecond of its own processor
    time, without ever sleeping. On a busy machine it would so keep the server from the very answer that it waits for;
    so it comes after the server, and its microseconds are long ones (the largest `lpj` that its arithmetic can take).
    """
    arguments = ["loglevel=8", "lpj=170000000"]
    return uml(server, virtio_id=UML_PCI_DEVICE_ID, arguments=arguments, prefix=["nice", "-n", "19"])


def ends_well(guest: Uml, server: Server) -> None:
    """Clean power-off: the kernel complains about nothing, and the server is left as it was."""
    guest.power_off()
    server.wait_for_disconnects(1)
    assert [line for line in guest.console.lines if TROUBLE.search(line)] == []
    assert "WARNING" not in server.log
    assert "Traceback" not in server.log


@pytest.mark.parametrize(
    ("name", "arguments", "declaration"),
    [
        ("generic", (), declare(TestDevice())),
        ("transitional", ("--flavour", "transitional"), declare(TestDevice(), flavour="transitional")),
        ("non-transitional", ("--flavour", "non-transitional"), declare(TestDevice(), flavour="non-transitional")),
        ("generic behind an Express port", ("--express",), declare(TestDevice(), behind_express_port=True)),
    ],
    ids=["generic", "transitional", "non-transitional", "express"],
)
def test_linux_finds_and_drives_every_flavour(
    serve: Serve, uml: Boot, name: str, arguments: tuple[str, ...], declaration: Declaration
) -> None:
    server = serve(*UML, *arguments)
    guest = boots(uml, server)
    ids = declaration.ids
    for field, value in (("vendor", ids.vendor), ("device", ids.device), ("subsystem_device", ids.subsystem)):
        assert attribute(guest, f"{FUNCTION}/{field}") == f"{value:#06x}"
    assert attribute(guest, f"{FUNCTION}/class") == "0x00ff00"
    guest.load()
    interrupts = guest.command("read /proc/interrupts")
    vectors = [line.split()[-1] for line in interrupts if "PCIe MSI" in line]
    assert vectors == ["virtio1-config", "virtio1-test"]
    assert guest.command("run virtio 10") == driver_request(10)
    assert server.said(5) == device_request(10)
    checks.ran(guest, transport=f"pci {name}, MSI-X", carrier="UML", at="virtio1")
    ends_well(guest, server)
    assert server.stop() == 0
    assert not server.path.exists()


@pytest.mark.parametrize(
    "features", ["-RING_PACKED,+SUSPEND", "-INDIRECT_DESC", "-EVENT_IDX", "-RING_PACKED,-EVENT_IDX"]
)
def test_requests_over_both_rings(serve: Serve, uml: Boot, features: str) -> None:
    server = serve(*UML, "--features", features)
    guest = boots(uml, server)
    guest.load()
    for count, number in enumerate((0, 253, 254, 255), 1):
        assert guest.command(f"run virtio {number}") == driver_request(number)
        assert server.said(5 * count)[-5:] == device_request(number)
    checks.ran(guest, transport="pci generic, MSI-X", carrier="UML", at="virtio1")
    ends_well(guest, server)


def test_ticks_come_as_messages_of_the_configuration_vector(serve: Serve, uml: Boot) -> None:
    server = serve(*UML, "--timer", "--first-after", "3", "--every", "0.5")
    guest = boots(uml, server)
    guest.load("timer=1")
    ticks = 4
    guest.console.wait_for(ACK, count=ticks)
    said = [line for line in guest.console.lines if line.startswith("virttest ")]
    assert said[: 3 * ticks] == driver_tick() * ticks
    assert server.said(2 * ticks)[: 2 * ticks] == [line for k in range(ticks) for line in device_tick(k)]
    checks.ran(guest, device="test (timer)", transport="pci generic, MSI-X", carrier="UML", at="virtio1")
    ends_well(guest, server)


def test_many_requests_from_two_processes(serve: Serve, uml: Boot) -> None:
    server = serve(*UML)
    guest = boots(uml, server)
    guest.load("quiet=1")
    guest.command("start virtio 20 500")
    guest.command("start virtio 30 500")
    guest.command("wait")
    lines = server.said(5 * 1000)
    requests = [lines[i : i + 5] for i in range(0, len(lines), 5)]
    assert requests.count(device_request(20)) == requests.count(device_request(30)) == 500
    ends_well(guest, server)


def test_everything_that_can_be_bound_goes_and_comes_back(serve: Serve, uml: Boot) -> None:
    server = serve(*UML)
    guest = boots(uml, server)
    guest.load()
    assert guest.command("run virtio 1") == driver_request(1)

    # Our driver, on the inner virtio device.
    guest.command("write /sys/bus/virtio/drivers/virtio_test/unbind virtio1")
    assert guest.command("run virtio 2", status=1) == OPEN_FAILED
    guest.command("write /sys/bus/virtio/drivers/virtio_test/bind virtio1")
    assert guest.command("run virtio 2") == driver_request(2)

    # Linux' virtio_pci, on the function; in between the function is reset by itself (FLR).
    guest.command(f"write /sys/bus/pci/drivers/virtio-pci/unbind {SLOT}")
    assert attribute(guest, f"{FUNCTION}/reset_method") == "af_flr"
    guest.command(f"write {FUNCTION}/reset 1")
    guest.command(f"write /sys/bus/pci/drivers/virtio-pci/bind {SLOT}")
    assert guest.command("run virtio 3") == driver_request(3)

    # The function itself.
    guest.command(f"write {FUNCTION}/remove 1")
    assert guest.command("run virtio 4", status=1) == OPEN_FAILED
    guest.command("write /sys/bus/pci/rescan 1")
    assert guest.command("run virtio 4") == driver_request(4)

    # The outer device, and with it the bus.
    guest.command("write /sys/bus/virtio/drivers/virtio-pci/unbind virtio0")
    assert guest.command("run virtio 5", status=1) == OPEN_FAILED
    guest.command("write /sys/bus/virtio/drivers/virtio-pci/bind virtio0")
    assert guest.command("run virtio 5") == driver_request(5)

    assert server.said(25) == [line for number in (1, 2, 3, 4, 5) for line in device_request(number)]
    ends_well(guest, server)


def test_the_kernel_s_own_driver_of_another_device(serve: Serve, uml: Boot) -> None:
    server = serve(*UML, "--device", "rng")
    guest = boots(uml, server)
    assert attribute(guest, f"{FUNCTION}/device") == "0x1005"
    assert attribute(guest, "/sys/class/misc/hw_random/rng_current") == "virtio_rng.0"
    ends_well(guest, server)


def test_a_guest_that_is_killed_leaves_a_function_for_the_next(serve: Serve, uml: Boot) -> None:
    server = serve(*UML)
    fds = server.fds()
    for number in range(3):
        guest = boots(uml, server)
        guest.load("quiet=1")
        guest.command(f"run virtio {number}")
        # It dies with requests on their way.
        guest.command(f"start virtio {number} 100000")
        guest.close()
        server.wait_for_disconnects(number + 1)
        assert server.fds() == fds
    guest = boots(uml, server)
    guest.load()
    assert guest.command("run virtio 10") == driver_request(10)
    server.console.wait_until(lambda lines: lines[-5:] == device_request(10), "request 10 on the device's console")


def test_power_off_without_taking_the_function_away(serve: Serve, uml: Boot) -> None:
    """The kernel then shuts the outer device before it removes the function; our driver waits for no reset of it."""
    server = serve(*UML)
    guest = boots(uml, server)
    guest.load()
    assert guest.command("run virtio 10") == driver_request(10)
    guest.start("halt")
    assert guest.console.wait() == 0
    server.wait_for_disconnects(1)
